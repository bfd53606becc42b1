"""A tracking server that is away for a while, and whose clock is not ours."""

from __future__ import annotations

import logging
import threading
import time
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient

from mlflow_dr.errors import TrackingError
from mlflow_dr.terminal import one_line_of
from mlflow_dr.tracking.client import LONGEST_REASON, is_transient, server_responds, tracking_uri

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
TRIES = 10  # if the server answers only sometimes, or not as MLflow does

Result = TypeVar("Result")


class Patience:
    """Repeats requests for as long as the server is away.

    Args:
        client: of the server.
        wait: seconds before a request is repeated; each further wait is twice as long.
        sleep: waits; passed in by tests.
    """

    def __init__(
        self, client: MlflowClient, wait: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._client = client
        self._wait = wait
        self._sleep = sleep
        self._lock = threading.Lock()  # several threads wait, and one of them logs it
        self._is_away = False

    def __call__(self, act: Callable[[], Result], *also: type[Exception]) -> Result:
        """The result of `act`, once the server answers.

        Args:
            act: may be called several times.
            also: errors, beside TrackingError, that a server that is away can cause.

        Raises:
            TrackingError: `act` raised it, or one of `also`, twice although the server answers; ten
                times if answers break off or make no sense.
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
            if tries > 1:  # after the first error it may be back already
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
        """Log once per outage that the server is away."""
        with self._lock:
            if not self._is_away:
                log.warning("%s; waiting for the server", one_line_of(str(error), LONGEST_REASON))
            self._is_away = True


def _may_pass(error: Exception) -> bool:
    """Whether an answer broke off or made no sense, so that another try may succeed."""
    cause = error.__cause__
    return isinstance(error, TrackingError) and cause is not None and is_transient(cause)


RESOLUTION_MS = 2000
SECONDS_TO_ANSWER = 5.0


class ServerClock:
    """The server's time, which dates checkpoints; this machine's clock may be wrong.

    It is taken from the date of one answer. Without a server it is this machine's time.

    Args:
        uri: of the server; the one that MLflow is set to when None.
    """

    def __init__(self, uri: str | None = None) -> None:
        self._ahead_ms = _ahead_ms(uri or tracking_uri())

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return _own_ms() + self._ahead_ms


def _ahead_ms(uri: str) -> int:
    """How far the server's clock is ahead of ours; 0 if the answer is too coarse to tell."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return 0
    host = address.netloc.rpartition("@")[2]  # urllib takes a user name for a part of the host
    health = f"{address.scheme}://{host}{address.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(health, timeout=SECONDS_TO_ANSWER) as got:
            date = parsedate_to_datetime(got.headers["Date"])
    except (OSError, HTTPException, TypeError, ValueError):
        return 0
    ahead = int(date.timestamp() * 1000) - _own_ms()
    return ahead if abs(ahead) > RESOLUTION_MS else 0


def _own_ms() -> int:
    return time.time_ns() // 1_000_000
