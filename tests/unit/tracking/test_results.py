import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.errors import CheckpointError, TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import (
    Checkpoint,
    announce_checkpoint,
    publish,
    run_checkpoints,
)
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.results import (
    PREFIX,
    State,
    failure_reason,
    mark_failed,
    record_result,
    validation_state,
    write_recorded,
)
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.status import curve_summary
from mlflow_dr.tracking.validations import (
    Metric,
    bind_name,
    check_same_config,
    metric_value,
    run_validations,
)

DATASET = ("demo", "abc")
FIGURES = {"mrr_at_10": 0.25, "seconds": 3.0}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "encoder"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def only(run: TrackedRun) -> Checkpoint:
    (checkpoint,) = run_checkpoints(run)
    return checkpoint


def points(client: MlflowClient, run: TrackedRun, key: str) -> list[tuple[int, float, int]]:
    history = client.get_metric_history(run.id, key)
    return [(point.step, point.value, point.timestamp) for point in history]


def test_a_checkpoint_is_ready_when_it_is_complete(run: TrackedRun, directory: Path) -> None:
    announce_checkpoint(run, 10, "0" * 64)
    assert not only(run).ready
    publish(run, directory, 20)
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (10, False),
        (20, True),
    ]
    (output,) = run.fetch().outputs.model_outputs
    assert output.step == 20


def test_another_model_of_the_run_is_not_a_checkpoint(
    client: MlflowClient, run: TrackedRun
) -> None:
    client.create_logged_model(run.experiment_id, name="other", source_run_id=run.id)
    assert run_checkpoints(run) == []


def test_checkpoints_come_by_step_over_several_pages(run: TrackedRun) -> None:
    for step in reversed(range(120)):
        announce_checkpoint(run, step, "")
    assert [checkpoint.step for checkpoint in run_checkpoints(run)] == list(range(120))


def test_a_fetched_checkpoint_is_verified(run: TrackedRun, directory: Path) -> None:
    publish(run, directory, 1)
    with checkpoint_files(only(run)) as copy:
        assert (copy / "model.safetensors").read_bytes() == b"weights"
    (Path(only(run).location.removeprefix("file://")) / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(CheckpointError, match="6 bytes, but 7"), checkpoint_files(only(run)):
        pass


def test_artifacts_that_are_gone_are_a_checkpoint_error(run: TrackedRun) -> None:
    announce_checkpoint(run, 1, "0" * 64)
    with pytest.raises(CheckpointError), checkpoint_files(only(run)):
        pass


def test_a_result_is_on_run_and_checkpoint_with_the_checkpoints_time(
    client: MlflowClient, run: TrackedRun, directory: Path
) -> None:
    publish(run, directory, 50)
    checkpoint = only(run)
    assert validation_state(checkpoint, "val") is State.OPEN
    written = record_result(run, checkpoint, "val", FIGURES, DATASET)
    assert written["lag_seconds"] >= 0
    assert points(client, run, "val/mrr_at_10") == [(50, 0.25, checkpoint.created_ms)]
    metrics = {
        metric.key: metric for metric in client.get_logged_model(checkpoint.model_id).metrics
    }
    assert set(metrics) == {"val/mrr_at_10", "timing/val/seconds", "timing/val/lag_seconds"}
    assert metrics["val/mrr_at_10"].dataset_digest == "abc"
    assert validation_state(only(run), "val") is State.DONE
    assert validation_state(only(run), "other") is State.OPEN


def test_a_second_result_changes_nothing(
    client: MlflowClient, run: TrackedRun, directory: Path
) -> None:
    publish(run, directory, 50)
    first = record_result(run, only(run), "val", FIGURES, DATASET)
    second = record_result(run, only(run), "val", {**FIGURES, "seconds": 9.0}, DATASET)
    assert second == first
    for key in ("val/mrr_at_10", "timing/val/seconds", "timing/val/lag_seconds"):
        assert len(points(client, run, key)) == 1


def test_a_record_without_metrics_gets_its_metrics_without_evaluation(
    client: MlflowClient, run: TrackedRun, directory: Path
) -> None:
    publish(run, directory, 50)
    record = json.dumps({"values": FIGURES, "written_ms": 1})
    client.log_model_params(only(run).model_id, {f"{PREFIX}val": record})
    assert validation_state(only(run), "val") is State.RECORDED
    write_recorded(run, only(run), "val", DATASET)
    write_recorded(run, only(run), "val", DATASET)
    assert validation_state(only(run), "val") is State.DONE
    assert len(points(client, run, "timing/val/seconds")) == 1


def test_metrics_only_on_the_run_are_completed_without_duplicates(
    client: MlflowClient, run: TrackedRun, directory: Path
) -> None:
    publish(run, directory, 50)
    checkpoint = only(run)
    record = json.dumps({"values": FIGURES, "written_ms": 1})
    client.log_model_params(checkpoint.model_id, {f"{PREFIX}val": record})
    client.log_metric(run.id, "timing/val/seconds", 3.0, timestamp=checkpoint.created_ms, step=50)
    write_recorded(run, only(run), "val", DATASET)
    assert len(points(client, run, "timing/val/seconds")) == 1
    assert validation_state(only(run), "val") is State.DONE


def test_a_failure_is_recorded_with_its_reason(
    client: MlflowClient, run: TrackedRun, directory: Path
) -> None:
    publish(run, directory, 50)
    mark_failed(run, only(run), "val", "bytes differ")
    assert validation_state(only(run), "val") is State.FAILED
    assert only(run).tags[f"{PREFIX}val.failed"] == "bytes differ"


def test_a_name_stands_for_one_configuration(run: TrackedRun) -> None:
    """Of several that bind it at the same time, too: MLflow takes a param's first value."""
    first, second = {"measures": "mrr@10"}, {"measures": "ndcg@10"}
    assert run_validations(run).get("val") is None
    assert bind_name(run, "val", first) == first
    assert bind_name(run, "val", first) == first
    assert bind_name(run, "val", second) == first
    assert run_validations(run).get("val") == first
    assert bind_name(run, "other", second) == second
    check_same_config(run, "val", first, first)
    with pytest.raises(UsageError, match=r"mrr@10.*ndcg@10.*--name"):
        check_same_config(run, "val", first, second)


def test_the_summary_names_first_last_and_best(run: TrackedRun, directory: Path) -> None:
    for step in (0, 10, 20):
        publish(run, directory, step)
    for checkpoint, value in zip(run_checkpoints(run), (0.1, 0.5, 0.4), strict=True):
        record_result(run, checkpoint, "val", {"mrr_at_10": value}, DATASET)
    text = curve_summary(run, "val", ["mrr_at_10"])
    assert "3 checkpoints validated" in text
    assert "best   step 10" in text
    assert run_checkpoints(run)[1].uri in text
    assert "first  step 0" in text
    assert "last   step 20" in text


def test_the_summary_of_a_run_without_checkpoints(run: TrackedRun) -> None:
    assert "0 checkpoints validated" in curve_summary(run, "val", ["mrr_at_10"])


@pytest.mark.parametrize(
    "record",
    ["{", "[1]", "7", '{"values": [1]}', '{"values": {"mrr_at_10": "high"}}', "[" * 5000],
    ids=lambda text: text[:20],
)
def test_a_malformed_record_counts_as_a_failure(
    run: TrackedRun, directory: Path, record: str
) -> None:
    """A record cannot be replaced."""
    publish(run, directory, 1)
    run.client.log_model_params(only(run).model_id, {f"{PREFIX}val": record})
    checkpoint = only(run)
    assert validation_state(checkpoint, "val") is State.FAILED
    assert "is not a record of metrics" in failure_reason(checkpoint, "val")
    assert metric_value(checkpoint, Metric("val", "mrr_at_10")) is None
    with pytest.raises(TrackingError, match="not a record of metrics"):
        record_result(run, checkpoint, "val", FIGURES, DATASET)


@pytest.mark.parametrize("text", ["abc", "[1]", "[" * 5000], ids=lambda text: text[:20])
def test_a_name_without_a_configuration(run: TrackedRun, text: str) -> None:
    run.log_params({f"{PREFIX}val": text, f"{PREFIX}test": "{}"})
    with pytest.raises(UsageError, match="another --name"):
        bind_name(run, "val", {"depth": 10})
    assert list(run_validations(run)) == ["test"]
