"""The tracking server's time, which checkpoints are dated by; our own clock may be wrong."""

from __future__ import annotations

import time
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.parse import urlsplit

from mlflow_dr.tracking.client import tracking_uri

RESOLUTION_MS = 2000
SECONDS_TO_ANSWER = 5.0


class ServerClock:
    """The time of the server, by the date of one of its answers; without a server our own.

    Args:
        uri: the server; the one that MLflow is set to when None.
    """

    def __init__(self, uri: str | None = None) -> None:
        self._ahead_ms = _ahead_ms(uri or tracking_uri())

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return _own_ms() + self._ahead_ms


def _ahead_ms(uri: str) -> int:
    """How far the server is ahead of us; 0 within the second that its answer is dated to."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return 0
    host = address.netloc.rpartition("@")[2]  # urllib takes a user for a part of the host
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
