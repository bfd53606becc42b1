import pytest
from mlflow import MlflowClient
from mlflow.entities import Param

from mlflow_dr.errors import RunGoneError, TrackingError, UsageError
from mlflow_dr.tracking.context import COMMAND_VARIABLE, DenseRetrievalRunContext
from mlflow_dr.tracking.runs import (
    RUN_VARIABLE,
    TrackedRun,
    find_run,
    is_over,
    open_run,
    resolve_run,
)


def test_existing_params_are_kept(client: MlflowClient, run: TrackedRun) -> None:
    client.log_batch(run.id, params=[Param("dataset", "demo")])
    run.log_params({"dataset": "another spelling", "model": "tiny", "nothing": None})
    assert run.fetch().data.params == {"dataset": "demo", "model": "tiny"}


def test_params_are_logged_in_several_requests(run: TrackedRun) -> None:
    run.log_params({f"p{index}": index for index in range(250)})
    assert len(run.fetch().data.params) == 250


def test_a_param_longer_than_the_server_takes_is_cut(run: TrackedRun) -> None:
    run.log_params({"long": "x" * 10_000})
    assert len(run.fetch().data.params["long"]) == 6000


def test_metrics_arrive_by_the_time_the_run_ends(client: MlflowClient, run: TrackedRun) -> None:
    for step in range(20):
        run.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    run.finish("FINISHED")
    history = client.get_metric_history(run.id, "train/loss")
    assert sorted(point.step for point in history) == list(range(20))


def test_the_collection_is_a_dataset_input(run: TrackedRun) -> None:
    run.log_collection("demo", "abc", "here", {"passages": 3}, context="training")
    (entry,) = run.fetch().inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("demo", "abc")
    assert entry.dataset.profile == '{"passages": 3}'
    assert entry.tags[0].value == "training"


def test_no_run_with_that_id(client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match="no run 'f00'"):
        find_run(client, "f00")


def test_a_run_goes_by_its_name_or_the_beginning_of_its_id(
    client: MlflowClient, experiment: str
) -> None:
    named = client.create_run(experiment, run_name="it's mine")
    twice = [client.create_run(experiment, run_name="twice") for _ in range(2)]
    for text in ("it's mine", named.info.run_id[:12], named.info.run_id):
        assert resolve_run(client, text).id == named.info.run_id
    with pytest.raises(UsageError, match="run 'twice' could be twice") as caught:
        resolve_run(client, "twice")
    assert all(run.info.run_id[:8] in str(caught.value) for run in twice)
    with pytest.raises(RunGoneError, match=r"no run 'it s mine' .*; did you mean \"it's mine\"\?"):
        resolve_run(client, "it s mine")
    with pytest.raises(RunGoneError, match=f"no run '{'0' * 32}'"):
        resolve_run(client, "0" * 32)


def test_a_deleted_run_says_how_to_restore_it(client: MlflowClient, run: TrackedRun) -> None:
    client.delete_run(run.id)
    with pytest.raises(TrackingError, match=f"mlflow runs restore --run-id {run.id}"):
        find_run(client, run.id)


def test_a_failed_run_is_over(client: MlflowClient, run: TrackedRun) -> None:
    assert not is_over(run.fetch())
    client.set_terminated(run.id, "FAILED")
    assert is_over(run.fetch())


def test_the_run_of_a_parent_is_taken_over_with_our_tags(
    client: MlflowClient, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, run.id)
    monkeypatch.setenv(COMMAND_VARIABLE, "train")
    client.set_terminated(run.id, "FINISHED")
    opened = open_run(client)
    assert opened.id == run.id
    assert not is_over(opened.fetch())
    assert opened.fetch().data.tags["mlflow_dr.command"] == "train"


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED"])
def test_a_run_of_a_parent_gets_the_requested_name(
    client: MlflowClient, run: TrackedRun, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """As under `mlflow run . -P run_name=...`, which makes the run before us."""
    monkeypatch.setenv(RUN_VARIABLE, run.id)
    client.update_run(run.id, status=status)
    assert open_run(client, name="second try").name == "second try"
    resumed = client.get_run(run.id)
    assert resumed.info.run_name == resumed.data.tags["mlflow.runName"] == "second try"
    assert resumed.info.status == "RUNNING"
    assert open_run(client).name == "second try"


def test_a_new_run_gets_the_requested_name(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    assert client.get_run(open_run(client, name="first try").id).info.run_name == "first try"


def test_a_new_run_goes_to_the_experiment_by_name(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    first = open_run(client, "retrievers")
    second = open_run(client, "retrievers")
    assert first.id != second.id
    assert first.experiment_id == second.experiment_id
    assert client.get_experiment(first.experiment_id).name == "retrievers"


def test_context_tags_stay_away_from_other_peoples_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMAND_VARIABLE, raising=False)
    assert not DenseRetrievalRunContext().in_context()
    monkeypatch.setenv(COMMAND_VARIABLE, "train")
    assert DenseRetrievalRunContext().in_context()
    assert DenseRetrievalRunContext().tags()["mlflow_dr.torch"]


def test_an_unreachable_server_does_not_hide_the_original_error(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(status: str) -> None:
        raise TrackingError(f"ending run {run.id}: away")

    monkeypatch.setattr(run, "finish", away)
    with pytest.raises(ValueError, match="the first"), run.finish_on_exit("training"):
        raise ValueError("the first")
    assert "away" in caplog.text
    with pytest.raises(TrackingError, match="away"), run.finish_on_exit("training"):
        pass
