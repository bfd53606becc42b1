import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import (
    StopWatcher,
    clear_stop_request,
    request_stop,
    stop_request,
)

SECONDS = 0.02
Watch = Callable[..., list[str]]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watches a run; returns the list that reasons are put into."""
    watchers = []

    def watch(run: TrackedRun, seconds: float = SECONDS) -> list[str]:
        asked: list[str] = []
        watchers.append(StopWatcher(run, asked.append, seconds))
        return asked

    yield watch
    for watcher in watchers:
        watcher.close()
        assert not watcher._thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Flaky:
    """A client whose server can be made unreachable; it counts its requests."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.away = False
        self.looks = 0

    def get_run(self, run_id: str) -> Run:
        self.looks += 1
        if self.away:
            raise MlflowException("connection refused")
        return self._client.get_run(run_id)


def test_a_request_is_written_read_and_cleared(run: TrackedRun) -> None:
    assert stop_request(run) is None
    request_stop(run, "mrr@10 has not risen for 5 checkpoints")
    assert stop_request(run) == "mrr@10 has not risen for 5 checkpoints"
    assert run.fetch().data.tags["mlflow_dr.stop_request"] == stop_request(run)
    clear_stop_request(run)
    clear_stop_request(run)
    assert stop_request(run) is None


def test_a_reason_is_required_and_cut_to_the_servers_limit(run: TrackedRun) -> None:
    with pytest.raises(UsageError, match="needs a reason"):
        request_stop(run, " ")
    request_stop(run, "x" * 20_000)
    assert stop_request(run) == "x" * 5000


def test_the_watcher_reports_once_and_ends(run: TrackedRun, watch: Watch) -> None:
    asked = watch(run)
    time.sleep(5 * SECONDS)
    assert asked == []
    request_stop(run, "enough")
    wait_for(lambda: asked)
    request_stop(run, "more than enough")
    time.sleep(5 * SECONDS)
    assert asked == ["enough"]


def test_the_watcher_looks_immediately_and_from_another_thread(run: TrackedRun) -> None:
    request_stop(run, "enough")
    names: list[str] = []
    watcher = StopWatcher(run, lambda _: names.append(threading.current_thread().name), seconds=600)
    wait_for(lambda: names)
    watcher.close()
    assert names == ["stop-watcher"]


def test_an_unreachable_server_logs_one_warning_and_is_read_again(
    run: TrackedRun, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    client = run.client
    run.client = flaky = Flaky(client)  # type: ignore[assignment]
    flaky.away = True
    with caplog.at_level(logging.WARNING, "mlflow_dr"):
        asked = watch(run)
        wait_for(lambda: flaky.looks > 4)
        assert len(caplog.records) == 1
        assert "connection refused; looking again" in caplog.text
        request_stop(TrackedRun(client, client.get_run(run.id)), "enough")
        flaky.away = False
        wait_for(lambda: asked)
    assert asked == ["enough"]
    assert len(caplog.records) == 1


def test_closing_waits_neither_for_the_interval_nor_for_a_hanging_server(run: TrackedRun) -> None:
    asked: list[str] = []
    start = time.monotonic()
    waiting = StopWatcher(run, asked.append, seconds=600)
    time.sleep(0.2)
    waiting.close()
    assert time.monotonic() - start < 60
    assert not waiting._thread.is_alive()

    answers = threading.Event()
    client = run.client

    class Hanging(Flaky):
        def get_run(self, run_id: str) -> Run:
            self.looks += 1
            answers.wait(300)
            return super().get_run(run_id)

    run.client = hanging = Hanging(client)  # type: ignore[assignment]
    request_stop(TrackedRun(client, client.get_run(run.id)), "too late")
    watcher = StopWatcher(run, asked.append, seconds=SECONDS)
    wait_for(lambda: hanging.looks)
    start = time.monotonic()
    watcher.close()
    assert time.monotonic() - start < 60
    answers.set()
    watcher._thread.join(120)
    assert not watcher._thread.is_alive()
    assert asked == []
