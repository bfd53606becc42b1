"""Commands as processes that are restarted, awaited and killed."""

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
        argv: the command and its flags.
        variables: additional environment variables.
        log: the file for its output.
        name: its name in the table.
        before: a command line that runs the command, such as `unshare`.
        starts: how often it is started if it ends with an error.
        expected: the expected exit code of the last start; None accepts any.
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
        """Whether it has ended for the last time; restarts it after an error if it may."""
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
        """Whether it was not killed and has the expected exit code."""
        code = self.codes[-1] if self.codes else None
        return code is not None and code >= 0 and self._expected in (None, code)

    @property
    def tracebacks(self) -> int:
        """The number of tracebacks in its output."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")


def all_ended(validators: Sequence[Process], seconds: float = SECONDS_TO_END) -> float:
    """Start processes, wait until all have ended, and kill the rest; returns the seconds."""
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
