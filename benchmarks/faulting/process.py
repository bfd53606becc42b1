"""Commands as processes that are started again, waited for and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS_TO_END = 240


class Process:
    """An `mlflow-dr` command as a process of its own.

    Args:
        words: the command and its flags.
        variables: of its environment.
        log: where its output goes.
        name: for the table.
        before: words before the command, such as `unshare`.
        starts: how often it is started, while it ends with an error.
        expected: the exit code of its last start; any when None.
    """

    def __init__(
        self,
        argv: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        name: str,
        before: Sequence[str] = (),
        starts: int = 1,
        expected: int | None = 0,
    ) -> None:
        self.name = name
        self.log = log
        self.codes: list[int] = []
        self._argv = [*before, sys.executable, "-m", "mlflow_dr", *argv]
        self._variables = {**os.environ, **variables}
        self._starts = starts
        self._expected = expected
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it was started before."""
        if self._process is not None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, env=self._variables, stdout=log, stderr=log, start_new_session=True
            )

    def has_ended(self) -> bool:
        """Whether it has ended, for the last time; starts it again where it may be."""
        if self._process is None:
            return bool(self.codes)
        code = self._process.poll()
        if code is None:
            return False
        self.codes.append(code)
        self._process = None
        if code and len(self.codes) < self._starts:
            self.start()
            return False
        return True

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self.codes.append(self._process.wait())
        self._process = None

    @property
    def is_as_expected(self) -> bool:
        """Whether it has ended by itself, with the exit code that it should have."""
        code = self.codes[-1] if self.codes else None
        return code is not None and code >= 0 and self._expected in (None, code)

    @property
    def tracebacks(self) -> int:
        """How many it has printed."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")


def all_ended(validators: Sequence[Process], seconds: float = SECONDS_TO_END) -> float:
    """Start validators and wait until all have ended, or kill them; the seconds that it took."""
    start = time.monotonic()
    try:
        for process in validators:
            process.start()
        while time.monotonic() - start < seconds:
            # a list, because `has_ended` also starts a process again
            ended = [process.has_ended() for process in validators]
            if all(ended):
                break
            time.sleep(0.2)
    finally:
        for process in validators:
            process.kill()
    return time.monotonic() - start
