"""Waiting for a tracking server that is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mlflow import MlflowClient

from mlflow_dr.errors import TrackingError
from mlflow_dr.terminal import one_line_of
from mlflow_dr.tracking.client import LONGEST_REASON, is_transient, server_responds

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
TRIES = 10  # where the server answers, but not always, or not as MLflow does

Result = TypeVar("Result")


class Patience:
    """Does what needs the server, and does it again for as long as the server is away.

    Args:
        client: the server.
        wait: seconds before it is tried again; from time to time twice as long.
        sleep: waits; passed in by tests.
    """

    def __init__(
        self, client: MlflowClient, wait: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._client = client
        self._wait = wait
        self._sleep = sleep
        self._lock = threading.Lock()  # several threads wait, and one of them says so
        self._is_away = False

    def __call__(self, act: Callable[[], Result], *also: type[Exception]) -> Result:
        """What `act` gives, once it can be had.

        Args:
            act: may be called several times.
            also: what, beside TrackingError, may come of a server that is away.

        Raises:
            TrackingError: as `act` did although the server answers: twice, or ten times where
                answers break off or make no sense; or another of `also`.
        """
        tries, wait = 0, self._wait
        kinds: tuple[type[Exception], ...] = (TrackingError, *also)
        while True:
            try:
                return act()
            except kinds as error:
                if not server_responds(self._client):
                    self._note(error)
                    self._wait_for_server()
                    continue
                tries += 1
                if tries >= (TRIES if _may_pass(error) else 2):
                    raise
            if tries > 1:  # the first time it may have been away until just now
                self._sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _wait_for_server(self) -> None:
        wait = self._wait
        while not server_responds(self._client):
            self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        with self._lock:
            if self._is_away:
                log.info("the server answers again")
            self._is_away = False

    def _note(self, error: Exception) -> None:
        """Say once in an outage that the server is away."""
        with self._lock:
            if not self._is_away:
                log.warning("%s; waiting for the server", one_line_of(str(error), LONGEST_REASON))
            self._is_away = True


def _may_pass(error: Exception) -> bool:
    """Whether it came of an answer that broke off or made no sense, not of what the server said."""
    cause = error.__cause__
    return isinstance(error, TrackingError) and cause is not None and is_transient(cause)
