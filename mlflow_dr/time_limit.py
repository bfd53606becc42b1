"""A limit on the time that the main thread spends on something; it ends it as Ctrl-C would."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from mlflow_dr.errors import UsageError

SECONDS_UNTIL_TRIED_AGAIN = 0.001
SECONDS_UNTIL_REPEATED = 10.0  # Python ignores what is raised in some places, as in destructors


class TimeIsUp(BaseException):
    """The work under a limit took too long. Like KeyboardInterrupt, it is no `Exception`."""


class TimeLimit:
    """Interrupts `with` blocks of the main thread once they have taken so long together.

        limit = TimeLimit(60)
        with limit:
            fetch()
        wait_for_the_server()  # does not count
        with limit:
            work()

    A call into C, such as a matrix product, is not interrupted before it returns. A timer that
    somebody else has set (SIGALRM) goes on after each block.

    Args:
        seconds: of all blocks together; no limit when None.

    Raises:
        UsageError: there is a limit, and this is not the main thread, which alone gets signals.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        if seconds is not None and threading.current_thread() is not threading.main_thread():
            raise UsageError("a limit of seconds can only be set in the main thread of a process")
        self._left = seconds or 0.0
        self._begun = 0.0
        self._handler: Any = None
        self._timer = (0.0, 0.0)

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        if self._left <= 0:
            raise TimeIsUp
        self._begun = time.monotonic()
        self._handler = signal.signal(signal.SIGALRM, self._interrupt)
        self._timer = signal.setitimer(signal.ITIMER_REAL, self._left, SECONDS_UNTIL_REPEATED)

    def __exit__(self, *_: object) -> None:
        if self.seconds is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        taken = time.monotonic() - self._begun
        self._left -= taken
        delay, interval = self._timer
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - taken, 1e-6), interval)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Raised in one of the two methods, it would leave the timer and the handler behind.
        code = frame and frame.f_code
        if code is TimeLimit.__enter__.__code__:
            signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_TRIED_AGAIN, SECONDS_UNTIL_REPEATED)
        elif code is not TimeLimit.__exit__.__code__:
            raise TimeIsUp
