"""Asks a trainer to stop, by a tag on its run, which a thread of the trainer polls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

STOP_TAG = "mlflow_dr.stop_request"
LONGEST_REASON = 5000
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_TO_LEAVE = 0.5


def request_stop(run: TrackedRun, reason: str) -> None:
    """Ask the trainer of a run to end after its current step.

    Raises:
        UsageError: the reason is empty, which would be no request.
        TrackingError: the server did not take it.
    """
    if not reason.strip():
        raise UsageError("a stop request needs a reason, which the trainer logs")
    run.set_tags({STOP_TAG: reason[:LONGEST_REASON]})


def stop_request(run: TrackedRun) -> str | None:
    """The reason of the stop request on a run; None if there is no request.

    Raises:
        TrackingError: the server does not answer.
    """
    return run.fetch().data.tags.get(STOP_TAG) or None


def clear_stop_request(run: TrackedRun) -> None:
    """Remove the stop request from a run, if there is one; a resumed training does this.

    Raises:
        TrackingError: the server does not answer.
    """
    if stop_request(run) is not None:
        with tracking_errors(f"clearing the stop request of run {run.id}"):
            run.client.delete_tag(run.id, STOP_TAG)


class StopWatcher:
    """Polls for a stop request in a thread, until there is one.

    A failed poll is repeated; the first failure in a row is logged as a warning. The thread ends
    after a request, or after `close`.

    Args:
        run: of the training.
        ask: called once with the reason, on the watcher's thread.
        seconds: between two polls.
    """

    def __init__(
        self,
        run: TrackedRun,
        ask: Callable[[str], None],
        seconds: float = SECONDS_BETWEEN_LOOKS,
    ) -> None:
        self._run = run
        self._ask = ask
        self._seconds = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="stop-watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling; the result of a poll that is under way is ignored."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(SECONDS_TO_LEAVE)

    def _work(self) -> None:
        away = False
        while not self._closed.is_set():
            try:
                reason = stop_request(self._run)
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                if not away and not self._closed.is_set():
                    log.warning("stop requests cannot be read: %s; looking again", error)
                away = True
            else:
                if away:
                    log.info("stop requests can be read again")
                away = False
                if reason is not None and not self._closed.is_set():
                    self._ask(reason)
                    return
            self._closed.wait(self._seconds)
