"""A validator with --max-seconds, in one process, over a real store."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_dr.engines.processes import ProcessEngine
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval import shard_search
from mlflow_dr.retrieval.encode import encode_batches
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import State, failure_reason, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation import encoders
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts
from tests.unit.validation.configuring import VALIDATION, configured

BOTH = (VALIDATION, {**VALIDATION, "measures": "recall@3", "name": "test", "split": "test"})
MOST = 1000.0
REASON = "it took longer than 1000 s (--max-seconds)"


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow"},
        dev={"q1": {"p0": 1}},
        test={"q2": {"p3": 1}},
    )


@pytest.fixture
def overdue(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the time be up in the middle of encoding, for the evaluation of this number."""

    def make_overdue(number: int) -> None:
        real, evaluated = encoders.evaluate_all, []

        def evaluate_all(*asked: Any) -> Any:
            evaluated.append(asked)
            if len(evaluated) != number:
                return real(*asked)
            with monkeypatch.context() as patch:
                patch.setattr(shard_search, "encode_batches", cut_off)
                return real(*asked)

        monkeypatch.setattr(encoders, "evaluate_all", evaluate_all)

    return make_overdue


def cut_off(*asked: Any) -> Iterator[Any]:
    yield next(encode_batches(*asked))
    time_is_up()


def time_is_up(*_: Any, **__: Any) -> None:
    """What the timer does."""
    signal.raise_signal(signal.SIGALRM)


def watch(run: TrackedRun, *validations: dict[str, Any], **plan: Any) -> Counts:
    return run_validator(FollowedRun(run), configured(*validations, follow=False, **plan))


def test_a_checkpoint_that_takes_too_long_is_recorded_as_failed_and_the_next_is_validated(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    overdue: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All validations of its pass are; others that were waiting for it pass it over."""
    for step in (1, 2, 3):
        publishing(step)
    overdue(2)
    with caplog.at_level(logging.WARNING):
        counts = watch(run, *BOTH, max_seconds=MOST)
    assert (counts.done, counts.failed) == (2, 1)
    assert not counts.are_good
    _, slow, _ = run_checkpoints(run)
    for name in ("val", "test"):
        points = client.get_metric_history(run.id, f"timing/{name}/seconds")
        assert sorted(point.step for point in points) == [1, 3]
        assert validation_state(slow, name) is State.FAILED
        assert failure_reason(slow, name) == REASON
        assert latest_claim(slow, name).given_back
    warning = f"step 2 is stopped and recorded as failed: {REASON}; --retry-failed tries it again"
    assert [record.getMessage() for record in caplog.records] == [warning] * 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert watch(run, *BOTH).passed_over == 1
    assert watch(run, *BOTH, retry_failed=True).done == 1
    points = client.get_metric_history(run.id, "timing/val/seconds")
    assert sorted(point.step for point in points) == [1, 2, 3]


def test_processes_that_were_stopped_midway_encode_the_next_checkpoint(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their late answers about the checkpoint before do not become its figures."""
    for step in (1, 2):
        publishing(step)
    asked: list[str] = []
    send, wait = ProcessEngine.send, ProcessEngine.wait

    def noted(engine: ProcessEngine, handle: Any, request: str, *arguments: Any) -> None:
        asked.append(request)
        send(engine, handle, request, *arguments)

    def stopped(engine: ProcessEngine, handles: Any) -> Any:
        if "do" in asked and "stopped" not in asked:
            asked.append("stopped")
            time_is_up()
        return wait(engine, handles)

    monkeypatch.setattr(ProcessEngine, "send", noted)
    monkeypatch.setattr(ProcessEngine, "wait", stopped)
    counts = watch(run, {**VALIDATION, "device": "cpu,cpu"}, max_seconds=MOST, order="oldest")
    assert (counts.done, counts.failed) == (1, 1)
    slow, _ = run_checkpoints(run)
    assert failure_reason(slow, "val") == REASON
    claim = latest_claim(slow, "val")
    assert claim is not None and claim.given_back
    assert watch(run, {**VALIDATION, "name": "calm"}).done == 2
    (point,) = client.get_metric_history(run.id, "val/mrr_at_10")
    calm = {each.step: each.value for each in client.get_metric_history(run.id, "calm/mrr_at_10")}
    assert (point.step, point.value) == (2, calm[2])


def test_reading_a_checkpoint_counts(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(1)
    monkeypatch.setattr(encoders, "load_encoder", time_is_up)
    assert watch(run, VALIDATION, max_seconds=MOST).failed == 1
    assert failure_reason(run_checkpoints(run)[0], "val") == REASON


def test_tokenising_the_corpus_does_not_count(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done once, and would otherwise be stopped at each checkpoint anew."""
    publishing(1)
    counting: list[bool] = []
    real = encoders.tokenise

    def tokenise(*asked: Any) -> None:
        # a limit handles the signal while it counts
        counting.append("TimeLimit" in repr(signal.getsignal(signal.SIGALRM)))
        real(*asked)

    monkeypatch.setattr(encoders, "tokenise", tokenise)
    assert watch(run, VALIDATION, max_seconds=MOST).done == 1
    assert counting == [False]


def test_without_a_limit_nothing_is_stopped(
    run: TrackedRun, publishing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(1)
    monkeypatch.setattr(encoders, "tokenise", lambda *_: pytest.fail("the corpus is read twice"))
    assert watch(run, VALIDATION).done == 1


def test_another_thread_cannot_have_a_limit(
    run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    raised: list[Exception] = []

    def validate() -> None:
        try:
            watch(run, VALIDATION, max_seconds=1)
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=validate)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
    assert latest_claim(run_checkpoints(run)[0], "val") is None
