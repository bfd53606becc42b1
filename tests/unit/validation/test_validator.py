"""Following a run, in one process, over a real store."""

import errno
import gc
import json
import re
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from mlflow_dr import compat
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking import fetching, prefetch
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.claims import Claims, Owner, latest_claim
from mlflow_dr.tracking.following import FollowedDirectory, FollowedExperiment, FollowedRun
from mlflow_dr.tracking.results import State, failure_reason, validation_state
from mlflow_dr.tracking.runs import DATASET_TAG, TrackedRun
from mlflow_dr.tracking.status import progress_summary, tag_progress
from mlflow_dr.tracking.validations import chosen_metric, validation_steps
from mlflow_dr.validation import encoders, loading, validator, worker
from mlflow_dr.validation.scheduler import Scheduler
from mlflow_dr.validation.validator import Counts, _Validator, run_validator
from tests.unit.validation.configuring import VALIDATION, configured


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow"},
        dev={"q1": {"p0": 1}, "q2": {"p3": 1}},
    )


@pytest.fixture
def two_splits(folder: Path) -> None:
    """`test` beside `dev`."""
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\tp1\t1\n")


def watch(
    run: TrackedRun, *validations: dict[str, Any], sleep: Any = time.sleep, **plan: Any
) -> Counts:
    return run_validator(FollowedRun(run), configured(*validations, **plan), sleep)


def steps(client: MlflowClient, run: TrackedRun, key: str = "val/mrr_at_10") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.id, key))


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


def test_each_checkpoint_is_validated_once_over_two_calls(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(10)
    publishing(5)
    assert watch(run, VALIDATION, follow=False, sleep=no_sleep).done == 2
    publishing(20)
    assert watch(run, VALIDATION, follow=False, sleep=no_sleep).done == 1
    assert steps(client, run) == [5, 10, 20]
    assert steps(client, run, "timing/val/seconds") == [5, 10, 20]


@pytest.mark.parametrize("available", [0, 1 << 40])
def test_a_checkpoint_leaves_the_memory_before_the_next_is_evaluated(
    run: TrackedRun,
    publishing: Callable[[int], str],
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
) -> None:
    """And before it is loaded, where there is little memory."""
    monkeypatch.setattr(loading, "available_memory", lambda: available)
    save_encoder(tmp_path / "damaged", make_tiny(pooling="mean", normalize=True))
    _nan(tmp_path / "damaged")
    publishing(1)
    publish(run, tmp_path / "damaged", 2)
    publishing(3)
    publishing(4)
    weights: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def load(*arguments: Any, **options: Any) -> Encoder:
        left.append(sum(weight() is not None for weight in weights))
        encoder = load_encoder(*arguments, **options)
        weights.extend(map(weakref.ref, encoder.parameters()))
        return encoder

    monkeypatch.setattr(encoders, "load_encoder", load)
    gc.disable()  # it would free them, but late
    try:
        counts = watch(run, VALIDATION, follow=False, sleep=no_sleep)
    finally:
        gc.enable()
    assert (counts.done, counts.failed) == (3, 1)
    n_weights = len(weights) // 4
    assert max(left) <= (n_weights if available else 0)


def test_the_validator_waits_for_checkpoints_until_the_run_ends(
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


def test_a_broken_checkpoint_is_marked_failed_and_the_next_is_validated(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    publishing(2)
    first = run_checkpoints(run)[0]
    weights = Path(first.location.removeprefix("file://")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    counts = watch(run, VALIDATION, follow=False)
    assert (counts.done, counts.failed) == (1, 1)
    assert "bytes, but" in run_checkpoints(run)[0].tags["mlflow_dr.validation.val.failed"]
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
    assert watch(run, {**VALIDATION, "dataset": str(moved)}, follow=False).done == 1


def test_other_judgements_under_the_same_name_are_refused(
    run: TrackedRun, publishing: Callable[[int], str], folder: Path
) -> None:
    publishing(1)
    watch(run, VALIDATION, follow=False)
    (folder / "qrels" / "dev.tsv").write_text("q1\tp1\t1\n")
    with pytest.raises(UsageError, match="--name"):
        watch(run, VALIDATION, follow=False)


def test_the_tag_has_the_full_path_and_the_param_has_the_typed_name(
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


def test_a_claimed_checkpoint_is_left_alone_until_its_owner_is_gone(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    publishing(2)
    first, second = run_checkpoints(run)
    elsewhere = Owner("elsewhere", 1, "another boot", 0, "a token")
    dead = replace(Owner.me(), started=1, token="of a process that is gone")
    assert Claims(client, elsewhere).claim(first, "val")
    assert Claims(client, dead).claim(second, "val")
    assert watch(run, VALIDATION, follow=False).done == 1
    assert steps(client, run) == [2]
    claims = {
        checkpoint.step: latest_claim(checkpoint, "val") for checkpoint in run_checkpoints(run)
    }
    assert (claims[1].attempt, claims[1].owner) == (1, elsewhere)
    assert claims[2].attempt == 2


def test_a_claim_that_stands_still_is_taken_over(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    """By the observer's own clock; and the run's end is no reason to leave before."""
    publishing(1)
    (checkpoint,) = run_checkpoints(run)
    owner = Claims(client, Owner("elsewhere", 1, "another boot", 0, "a token"), every=0.05)
    assert owner.claim(checkpoint, "val")
    client.set_terminated(run.id)
    slept = 0

    def beat() -> str:
        claim = latest_claim(run_checkpoints(run)[0], "val")
        assert claim is not None
        return claim.beat

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += 1
        before, deadline = beat(), time.monotonic() + 120
        time.sleep(0.2)
        while slept <= 3 and beat() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        if slept == 3:  # it dies
            owner._closed.set()
            owner._thread.join()

    counts = run_validator(
        FollowedRun(run), configured(VALIDATION, poll_seconds=0.2, patience_seconds=0.5), sleep
    )
    assert counts.done == 1
    assert 5 <= slept <= 8
    assert steps(client, run) == [1]


def test_a_released_checkpoint_is_claimed_at_once(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    (checkpoint,) = run_checkpoints(run)
    owner = Claims(client, Owner("elsewhere", 1, "another boot", 0, "a token"))
    assert owner.claim(checkpoint, "val")
    owner.close()
    assert watch(run, VALIDATION, follow=False, sleep=no_sleep).done == 1


def test_an_error_that_ends_the_validator_gives_the_claim_back(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlflow_dr.validation.encoders.evaluate_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(run, VALIDATION)
    assert latest_claim(run_checkpoints(run)[0], "val").given_back


def test_ctrl_c_waits_until_figures_are_written(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishing(1)
    real = worker.record_result

    def slow(*args: Any) -> Any:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(worker, "record_result", slow)
    with pytest.raises(KeyboardInterrupt):
        watch(run, VALIDATION, follow=False)
    (checkpoint,) = run_checkpoints(run)
    assert validation_state(checkpoint, "val") is State.DONE
    assert not latest_claim(checkpoint, "val").given_back


def test_nothing_is_claimed_while_another_checkpoint_is_evaluated(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left to validators that are idle."""
    for step in range(3):
        publishing(step)
    claimed: list[int] = []
    real = encoders.evaluate_all

    def evaluate_all(*asked: Any) -> Any:
        done = real(*asked)
        claimed.append(
            sum(bool(latest_claim(checkpoint, "val")) for checkpoint in run_checkpoints(run))
        )
        return done

    monkeypatch.setattr(encoders, "evaluate_all", evaluate_all)
    assert watch(run, VALIDATION, follow=False, poll_seconds=5.0).done == 3
    assert claimed == [1, 2, 3]


def test_figures_are_recorded_during_the_next_evaluation(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where evaluating takes so long that the server is asked again before."""
    for step in (1, 2):
        publishing(step)
    monkeypatch.setitem(validator.SHARE_OF_SNAPSHOTS, "oldest", 1e9)
    begun: list[threading.Event] = [threading.Event(), threading.Event()]
    evaluate, record, evaluated = encoders.evaluate_all, worker.record_result, iter(begun)

    def evaluate_all(*asked: Any) -> Any:
        next(evaluated).set()
        return evaluate(*asked)

    def record_result(*args: Any) -> Any:
        assert begun[1].wait(300)
        return record(*args)

    monkeypatch.setattr(encoders, "evaluate_all", evaluate_all)
    monkeypatch.setattr(worker, "record_result", record_result)
    assert watch(run, VALIDATION, follow=False, poll_seconds=1e-6).done == 2
    assert steps(client, run) == [1, 2]
    for checkpoint in run_checkpoints(run):
        assert not latest_claim(checkpoint, "val").given_back


def test_several_validations_encode_the_corpus_once(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    two_splits: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishing(1)
    both = (VALIDATION, {**VALIDATION, "measures": "recall@3", "name": "test", "split": "test"})
    calls: list[int] = []
    real = encoders.evaluate_all

    def counted(encoder: Encoder, asked: Any, *more: Any) -> Any:
        calls.append(len(asked))
        return real(encoder, asked, *more)

    monkeypatch.setattr(encoders, "evaluate_all", counted)
    assert watch(run, *both, follow=False).done == 1
    assert calls == [2]
    monkeypatch.undo()
    alone = (
        {**validation, "name": f"alone-{validation.get('name', 'val')}"} for validation in both
    )
    assert watch(run, *alone, follow=False).done == 1
    values = client.get_run(run.id).data.metrics
    for key in ("val/mrr_at_10", "test/recall_at_3"):
        assert values[key] == values[f"alone-{key}"]
    assert "test/mrr_at_10" not in values


def test_a_validation_that_is_added_later_is_done_for_all_checkpoints(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    watch(run, VALIDATION, follow=False)
    publishing(2)
    assert watch(run, VALIDATION, {**VALIDATION, "name": "more"}, follow=False).done == 2
    for name in ("val", "more"):
        assert steps(client, run, f"{name}/mrr_at_10") == [1, 2]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"order": "newest"}, [8, 6, 4, 3, 1]),
        ({"order": "bisect"}, [8, 1, 4, 6, 3]),
        ({"every": 2}, [4, 6, 8]),
        ({"max_lag_seconds": 1e-9}, []),
        ({"max_lag_seconds": 1000}, [1, 3, 4, 6, 8]),
    ],
    ids=str,
)
def test_the_selected_checkpoints_and_their_order(
    run: TrackedRun,
    publishing: Callable[[int], str],
    plan: dict[str, Any],
    expected: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (4, 1, 8, 3, 6):
        publishing(step)
    with caplog.at_level("INFO", logger="mlflow_dr"):
        watch(run, VALIDATION, follow=False, **plan)
    done = [re.match(r"step (\d+): mrr", message) for message in caplog.messages]
    assert [int(match[1]) for match in done if match] == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [("newest", [3, 8, 2, 1]), ("bisect", [3, 8, 1, 2]), ("oldest", [1, 2, 3, 8])],
)
def test_a_newly_published_checkpoint_comes_first_in_newest_order(
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    order: str,
    expected: list[int],
) -> None:
    for step in (1, 2, 3):
        publishing(step)
    real = encoders.evaluate_all

    def evaluate_all(*asked: Any) -> Any:
        if not [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == 8]:
            publishing(8)
        time.sleep(0.3)
        return real(*asked)

    monkeypatch.setattr(encoders, "evaluate_all", evaluate_all)
    with caplog.at_level("INFO", logger="mlflow_dr"):
        watch(run, VALIDATION, follow=False, order=order, poll_seconds=0.1)
    done = [re.match(r"step (\d+): mrr", message) for message in caplog.messages]
    assert [int(match[1]) for match in done if match] == expected


def test_failed_checkpoints_are_retried_on_request(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    weights = Path(run_checkpoints(run)[0].location.removeprefix("file://")) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    for retry in (False, True):
        counts = watch(run, VALIDATION, follow=False, retry_failed=retry)
        assert (counts.done, counts.failed) == (0, 1)
    weights.write_bytes(whole)
    assert watch(run, VALIDATION, follow=False).done == 0
    assert watch(run, VALIDATION, follow=False, retry_failed=True).done == 1
    assert steps(client, run) == [1]
    assert watch(run, VALIDATION, follow=False, retry_failed=True).done == 0


def test_an_experiment_gets_new_runs_later(
    client: MlflowClient,
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Runs take turns; a run without a dataset is passed over with a reason."""
    experiment = client.create_experiment("some runs")
    runs: list[TrackedRun] = []

    def begin(dataset: str | None) -> TrackedRun:
        begun = TrackedRun(client, client.create_run(experiment))
        if dataset:
            begun.log_params({"dataset": dataset})
        for step in (1, 2):
            directory = tmp_path / f"{begun.id}-{step}"
            save_encoder(directory, make_tiny(seed=step, pooling="mean", normalize=True))
            publish(begun, directory, step)
        runs.append(begun)
        return begun

    def sleep(seconds: float) -> None:
        if len(runs) == 3:
            raise KeyboardInterrupt
        begin(str(folder) if runs else None)

    plan = configured(VALIDATION)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO", logger="mlflow_dr"):
        run_validator(FollowedExperiment(client, "some runs"), plan, sleep)
    assert [steps(client, run) for run in runs] == [[], [1, 2], [1, 2]]
    assert f"run {runs[0].id} is passed over: run {runs[0].id} names no dataset" in caplog.text


@pytest.fixture
def two_runs(
    client: MlflowClient, make_tiny: Callable[..., Encoder], tmp_path: Path, folder: Path
) -> tuple[FollowedExperiment, list[TrackedRun]]:
    """An experiment with two runs of two checkpoints each."""
    name = f"two runs of {tmp_path.name}"
    experiment = client.create_experiment(name, str(tmp_path / "artifacts"))
    runs = [TrackedRun(client, client.create_run(experiment)) for _ in range(2)]
    for run in runs:
        run.log_params({"dataset": str(folder)})
        for step in (1, 2):
            directory = tmp_path / f"{run.id}-{step}"
            save_encoder(directory, make_tiny(seed=step, pooling="mean", normalize=True))
            publish(run, directory, step)
    return FollowedExperiment(client, name), runs


@pytest.mark.parametrize("when", ["before", "evaluated", "noted"])
def test_a_deleted_run_of_an_experiment_is_passed_over(
    client: MlflowClient,
    two_runs: tuple[FollowedExperiment, list[TrackedRun]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    followed, (first, second) = two_runs
    name, real = {
        "before": ("mlflow_dr.validation.validator._Validator.run", _Validator.run),
        "evaluated": ("mlflow_dr.validation.encoders.evaluate_all", encoders.evaluate_all),
        "noted": ("mlflow_dr.validation.validator.tag_progress", tag_progress),
    }[when]

    def deleting(*args: Any) -> Any:
        client.delete_run(first.id)
        return real(*args)

    monkeypatch.setattr(name, deleting)
    counts = run_validator(followed, configured(VALIDATION, follow=False), no_sleep)
    assert counts.done == {"before": 2, "evaluated": 2, "noted": 4}[when]
    assert steps(client, second) == [1, 2]
    assert caplog.text.count(f"run {first.id} is passed over: it was deleted") == 1
    claims = [latest_claim(checkpoint, "val") for checkpoint in run_checkpoints(first)]
    assert all(claim is None or claim.given_back for claim in claims) or when == "noted"


def test_an_unreachable_server_is_waited_for(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Away while figures are recorded, for three looks; the work is not done again."""
    publishing(1)
    away = 0
    real = client._tracking_client.log_model_params

    def log_model_params(model_id: str, params: dict[str, str]) -> None:
        nonlocal away
        if "mlflow_dr.validation.val" in params and not away:
            away = 3
            raise MlflowException("no route to host")
        real(model_id, params)

    def search_experiments(*_: Any, **__: Any) -> list:
        nonlocal away
        if away > 1:
            away -= 1
            raise MlflowException("no route to host")
        return []

    monkeypatch.setattr(client._tracking_client, "log_model_params", log_model_params)
    monkeypatch.setattr(client, "search_experiments", search_experiments)
    slept: list[float] = []
    assert watch(run, VALIDATION, follow=False, sleep=slept.append, poll_seconds=3).done == 1
    assert slept == [3]
    assert steps(client, run) == [1]
    assert "no route to host; waiting for the server" in caplog.text


def test_the_server_becomes_unreachable_between_two_claims(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    two_splits: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Afterwards another checkpoint comes first, and the claimed one is still validated."""
    for step in range(3):
        publishing(step)
    client.set_terminated(run.id)
    claimed: list[str] = []
    real, candidates = client._tracking_client.log_model_params, Scheduler.candidates

    def log_model_params(model_id: str, params: dict[str, str]) -> None:
        claimed.extend(params)
        if len(claimed) == 2:
            raise MlflowException("no route to host")
        real(model_id, params)

    def other_ones(self: Scheduler, *rest: Any) -> Iterator[Any]:
        found = list(candidates(self, *rest))
        yield from found if len(claimed) != 2 else reversed(found)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 5

    monkeypatch.setattr(client._tracking_client, "log_model_params", log_model_params)
    monkeypatch.setattr(Scheduler, "candidates", other_ones)
    monkeypatch.setattr("mlflow_dr.validation.validator.SHARE_OF_SNAPSHOTS", {"oldest": 10.0})
    slept: list[float] = []
    both = (VALIDATION, {**VALIDATION, "name": "test", "split": "test"})
    watch(run, *both, sleep=sleep, poll_seconds=0.001)
    for name in ("val", "test"):
        assert steps(client, run, f"{name}/mrr_at_10") == [0, 1, 2]


def test_a_checkpoint_without_files_fails_alone(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    publishing(2)
    shutil.rmtree(run_checkpoints(run)[0].location.removeprefix("file://"))
    counts = watch(run, VALIDATION, follow=False)
    assert (counts.done, counts.failed) == (1, 1)
    assert steps(client, run) == [2]


def test_a_directory_of_checkpoints(
    client: MlflowClient,
    run: TrackedRun,
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    folder: Path,
) -> None:
    """The figures equal those of the published encoder.

    A directory without an encoder fails alone.
    """
    output = tmp_path / "output"
    for step in (1, 2):
        encoder = make_tiny(seed=step, pooling="mean", normalize=True)
        save_encoder(output / f"checkpoint-{step}", encoder)
        publish(run, output / f"checkpoint-{step}", step)
    shutil.copytree(output / "checkpoint-1", output / "checkpoint-3")
    (output / "checkpoint-3" / "config.json").write_text('{"model_type": "no such"}')
    validation = {**VALIDATION, "dataset": str(folder)}
    assert watch(run, validation, follow=False).done == 2
    other = TrackedRun(client, client.create_run(run.experiment_id))
    followed = FollowedDirectory(other, output, is_mine=True)
    counts = run_validator(followed, configured(validation, follow=False), no_sleep)
    assert (counts.done, counts.failed) == (2, 1)
    histories = [client.get_metric_history(tracked.id, "val/mrr_at_10") for tracked in (run, other)]
    ours, theirs = (
        [(point.step, point.value) for point in sorted(h, key=lambda p: p.step)] for h in histories
    )
    assert ours == theirs


def test_a_directory_that_vanishes_while_it_is_read(
    client: MlflowClient,
    run: TrackedRun,
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "output"
    for step in (1, 2):
        save_encoder(output / f"checkpoint-{step}", make_tiny(seed=step))
    real = shutil.copytree

    def rotated(source: Path, *args: Any, **more: Any) -> Any:
        shutil.rmtree(output / "checkpoint-1", ignore_errors=True)
        return real(source, *args, **more)

    monkeypatch.setattr(shutil, "copytree", rotated)
    followed = FollowedDirectory(run, output, is_mine=True)
    plan = configured({**VALIDATION, "dataset": str(folder)}, follow=False)
    counts = run_validator(followed, plan, no_sleep)
    assert (counts.done, counts.failed) == (1, 0)
    assert "step 1 is passed over" in caplog.text
    assert steps(client, run) == [2]


def test_the_run_shows_the_progress_of_validation(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    publishing(7)
    watch(run, VALIDATION, follow=False)
    tags = client.get_run(run.id).data.tags
    status = tags["mlflow_dr.validation.val.status"]
    assert status == "2 of 2 checkpoints done, the last at step 7"


def test_a_poll_makes_no_request_for_an_unchanged_run(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where an experiment has hundreds of runs, almost all of them are such."""
    publishing(1)
    summed: list[str] = []
    polls: list[int] = []

    def counted(checkpoints: Any, name: str) -> str:
        summed.append(name)
        return progress_summary(checkpoints, name)

    def sleep(seconds: float) -> None:
        polls.append(len(summed))
        if len(polls) == 2:
            publishing(2)
        if len(polls) == 4:
            client.set_terminated(run.id)

    monkeypatch.setattr("mlflow_dr.validation.policies.progress_summary", counted)
    watch(run, VALIDATION, sleep=sleep)
    assert polls[0] == polls[1] < polls[2] == polls[3]
    assert client.get_run(run.id).data.tags["mlflow_dr.validation.val.status"].startswith("2 of 2")


def _nan(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file({name: value * float("nan") for name, value in state.items()}, directory / "nan")
    (directory / "nan").replace(directory / "model.safetensors")


def _other_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


def _pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def _without_tokenizer(directory: Path) -> None:
    for path in [*directory.glob("tokenizer*"), *directory.glob("vocab*")]:
        path.unlink()


@pytest.mark.parametrize("damage", [_nan, _other_architecture, _pickled, _without_tokenizer])
def test_a_checkpoint_that_is_not_an_encoder_fails_alone_with_the_reason(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    directory = tmp_path / "damaged"
    save_encoder(directory, make_tiny(pooling="mean", normalize=True))
    damage(directory)
    publish(run, directory, 1)
    publishing(2)
    counts = watch(run, VALIDATION, follow=False)
    assert (counts.done, counts.failed) == (1, 1)
    assert steps(client, run) == [2]
    failed = run_checkpoints(run)[0]
    assert len(failure_reason(failed, "val")) > 20
    assert "\n" not in failure_reason(failed, "val")


def test_a_full_disk_does_not_fail_the_checkpoint(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(1)

    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mlflow_dr.tracking.fetching._fetch", full)
        with pytest.raises(OSError, match="TMPDIR names a directory on another one"):
            watch(run, VALIDATION, follow=False)
    (checkpoint,) = run_checkpoints(run)
    assert latest_claim(checkpoint, "val").given_back
    assert validation_state(checkpoint, "val") is State.OPEN
    assert watch(run, VALIDATION, follow=False).done == 1


def test_an_experiment_without_runs(client: MlflowClient) -> None:
    client.create_experiment("nothing yet")
    followed = FollowedExperiment(client, "nothing yet")
    counts = run_validator(followed, configured(VALIDATION, follow=False), no_sleep)
    assert (counts.done, counts.failed) == (0, 0)


def test_validating_on_test_data_logs_a_warning(
    run: TrackedRun,
    folder: Path,
    publishing: Callable[[int], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "qrels" / "dev.tsv").rename(other / "qrels" / "test.tsv")
    publishing(1)
    config = {**VALIDATION, "dataset": str(other)}
    watch(run, {**config, "name": "meant", "split": "test"}, follow=False)
    assert "chosen on test data" not in caplog.text
    watch(run, config, follow=False)
    assert "has no development split" in caplog.text


def test_the_first_validation_decides_and_each_has_its_own_steps(
    run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(3), publishing(4)
    watch(run, {**VALIDATION, "name": "z"}, follow=False, every=3)
    watch(run, VALIDATION, follow=False)
    assert chosen_metric(run).validation == "z"
    assert validation_steps(run) == {"z": 3, "val": 1}
    watch(run, {**VALIDATION, "name": "z"}, follow=False, every=4)
    assert validation_steps(run) == {"z": 1, "val": 1}


def test_several_validations_count_as_one_checkpoint(
    run: TrackedRun, publishing: Callable[[int], str], caplog: pytest.LogCaptureFixture
) -> None:
    publishing(1), publishing(2)
    counts = watch(run, VALIDATION, {**VALIDATION, "name": "more"}, follow=False)
    assert (counts.done, counts.validations) == (2, 4)
    assert counts.checkpoints == "2 checkpoints (4 validations)"


def test_the_validator_says_why_there_is_nothing_to_do(
    run: TrackedRun, publishing: Callable[[int], str], client: MlflowClient
) -> None:
    client.create_experiment("of nothing")
    followed = FollowedExperiment(client, "of nothing")
    counts = run_validator(followed, configured(VALIDATION, follow=False))
    assert counts.nothing == "no checkpoint is published yet"

    def nothing(**plan: Any) -> str:
        followed = FollowedRun(run)
        counts = run_validator(followed, configured(VALIDATION, follow=False, **plan))
        assert counts.are_good == (not counts.nothing)
        return counts.nothing

    publishing(5)
    assert nothing(every=2) == "--every and --max-lag leave none of 1 checkpoints"
    assert nothing() == ""
    assert nothing() == ""  # it is done


@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_the_next_checkpoint_is_fetched_while_one_is_evaluated(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    order: str,
) -> None:
    """Each is fetched once. The newest of a run that goes on is not published yet."""
    events: list[tuple[str, str]] = []
    ids = {publishing(step): str(step) for step in (1, 2, 3)}
    download, evaluate = compat.download_file, encoders.EncoderKind.evaluate

    def downloaded(store: Any, name: str, path: str) -> None:
        if name == "model.safetensors":
            model_id = next(name for name in ids if name in str(store.artifact_uri))
            events.append(("fetched", ids[model_id]))
            fetched[ids[model_id]].set()
        download(store, name, path)

    def evaluated(self: Any, model: Any, checkpoint: Any, *rest: Any) -> Any:
        step = str(checkpoint.step)
        following = str(checkpoint.step + 1)
        if following in fetched and order == "oldest":
            assert fetched[following].wait(20)
        events.append(("evaluated", step))
        return evaluate(self, model, checkpoint, *rest)

    fetched = {step: threading.Event() for step in ids.values()}
    for module in (fetching, prefetch):
        monkeypatch.setattr(module, "local_directory", lambda location: None)
    monkeypatch.setattr(compat, "download_file", downloaded)
    monkeypatch.setattr(encoders.EncoderKind, "evaluate", evaluated)
    assert watch(run, VALIDATION, follow=False, order=order).done == 3
    expected = {
        "oldest": ["f1", "f2", "e1", "f3", "e2", "e3"],
        "newest": ["f3", "e3", "f2", "e2", "f1", "e1"],
    }
    assert [kind[0] + step for kind, step in events] == expected[order]
