"""Following a run, in one process, over a real store."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.encoder.directory import save_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.checkpoints import checkpoints_of, publish
from mlflow_dr.tracking.runs import DATASET_TAG, TrackedRun
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.watch import Validation, watch

VALIDATION = Validation(Settings(parse_measures("mrr@10"), device="cpu", dtype="fp32"))


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow"},
        dev={"q1": {"p0": 1}, "q2": {"p3": 1}},
    )


@pytest.fixture
def publishing(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path, folder: Path
) -> Callable[[int], str]:
    """Publishes an encoder of other weights for each step."""
    run.log_params({"dataset": str(folder), "validation_split": "dev"})

    def publish_step(step: int) -> str:
        directory = tmp_path / f"step-{step}"
        save_encoder(directory, make_tiny(seed=step, pooling="mean", normalize=True))
        return publish(run, directory, step)

    return publish_step


def steps(client: MlflowClient, run: TrackedRun, key: str = "val/mrr_at_10") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.id, key))


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


def test_each_checkpoint_once_also_over_two_calls(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(10)
    publishing(5)
    assert watch(run, VALIDATION, follow=False, sleep=no_sleep).done == 2
    publishing(20)
    assert watch(run, VALIDATION, follow=False, sleep=no_sleep).done == 1
    assert steps(client, run) == [5, 10, 20]
    assert steps(client, run, "val/seconds") == [5, 10, 20]


def test_it_waits_for_checkpoints_until_the_run_has_ended(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    events = iter([lambda: publishing(1), lambda: None, lambda: publishing(2)])

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        event = next(events, None)
        if event is None:
            publishing(3)
            client.set_terminated(run.id, "FINISHED")
        else:
            event()

    assert watch(run, VALIDATION, poll_seconds=0.5, sleep=sleep).done == 3
    assert steps(client, run) == [1, 2, 3]


def test_a_poll_costs_two_requests(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in range(3):
        publishing(step)
    watch(run, VALIDATION, follow=False)
    requests: list[str] = []
    polls: list[int] = []
    for name in ("get_run", "search_logged_models", "get_logged_model", "get_metric_history"):
        real = getattr(client, name)

        def counted(
            *args: object, _name: str = name, _real: object = real, **more: object
        ) -> object:
            requests.append(_name)
            return _real(*args, **more)  # type: ignore[operator]

        monkeypatch.setattr(client, name, counted)

    def sleep(seconds: float) -> None:
        polls.append(len(requests))
        if len(polls) == 4:
            client.set_terminated(run.id)

    watch(run, VALIDATION, sleep=sleep)
    assert [after - before for before, after in pairwise(polls)] == [2, 2, 2]


def test_a_broken_checkpoint_is_marked_and_the_next_one_goes_on(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    publishing(2)
    first = checkpoints_of(run)[0]
    weights = Path(first.location.removeprefix("file://")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    counts = watch(run, VALIDATION, follow=False)
    assert (counts.done, counts.failed) == (1, 1)
    assert "bytes, but" in checkpoints_of(run)[0].tags["mlflow_dr.validation.val.failed"]
    assert steps(client, run) == [2]
    again = watch(run, VALIDATION, follow=False)
    assert (again.done, again.failed) == (0, 0)


def test_the_same_collection_at_another_path_is_the_same_validation(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str], folder: Path
) -> None:
    publishing(1)
    watch(run, VALIDATION, follow=False)
    moved = folder.with_name("elsewhere")
    shutil.move(folder, moved)
    publishing(2)
    assert watch(run, replace(VALIDATION, dataset=str(moved)), follow=False).done == 1


def test_other_judgements_under_the_same_name_are_refused(
    run: TrackedRun, publishing: Callable[[int], str], folder: Path
) -> None:
    publishing(1)
    watch(run, VALIDATION, follow=False)
    (folder / "qrels" / "dev.tsv").write_text("q1\tp1\t1\n")
    with pytest.raises(UsageError, match="--name"):
        watch(run, VALIDATION, follow=False)


def test_the_tag_has_the_whole_path_where_the_param_has_what_was_typed(
    client: MlflowClient, run: TrackedRun, folder: Path
) -> None:
    run.set_tags({DATASET_TAG: str(folder)})
    run.log_params({"dataset": "../relative/to/elsewhere", "validation_split": "dev"})
    assert watch(run, VALIDATION, follow=False).done == 0


def test_a_run_that_names_no_dataset(run: TrackedRun) -> None:
    with pytest.raises(UsageError, match="give --dataset"):
        watch(run, VALIDATION, follow=False)


def test_a_run_that_is_deleted_while_followed(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    with pytest.raises(TrackingError, match="was deleted"):
        watch(run, VALIDATION, sleep=lambda seconds: client.delete_run(run.id))
