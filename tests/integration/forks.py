"""Commands in forks of one process (`forked_commands.py`), as tests start, read and end them."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

import psutil

SCRIPT = Path(__file__).parent / "forked_commands.py"
SECONDS_TO_BEGIN = 300
READY = "ready\n"
NO_MOMENT = ("nowhere", signal.SIGKILL)


class Fork:
    """A command; what tests use of `subprocess.Popen`.

    Attributes:
        pid: its process id.
        returncode: how it ended, once that was asked.
        stdout: what it prints, if that is read here.
    """

    def __init__(self, state: BinaryIO, stdout: TextIO | None) -> None:
        self.returncode: int | None = None
        self.stdout = stdout
        self._state = state
        self.pid = self._next(SECONDS_TO_BEGIN)

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, once it has.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        if self.returncode is None:
            self.returncode = self._next(timeout)
            self._state.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it prints until it ends.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        assert self.stdout is not None
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        self.wait(0 if reader.is_alive() else timeout)
        self.stdout.close()
        return found[0], None

    def send_signal(self, number: int) -> None:
        """If it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and the processes that it has started."""
        if self.poll() is None:
            for child in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            self.send_signal(signal.SIGKILL)

    def _next(self, timeout: float | None) -> int:
        """The next number that its attendant says."""
        if not select.select([self._state], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(["mlflow-dr"], timeout or 0)
        if not (line := self._state.readline()):
            raise ChildProcessError("the attendant of the command has died")
        return int(line)


class Forks:
    """The process that forks.

    Args:
        variables: what it sees of the environment.
        directory: an empty directory for pipes.

    Raises:
        ChildProcessError: it has not come to begin.
    """

    def __init__(self, variables: Mapping[str, str], directory: Path) -> None:
        self._variables = dict(variables)
        self._directory = directory
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._variables,
            text=True,
            start_new_session=True,
        )
        if self._process.stdout.readline() != READY:  # its errors go where pytest's do
            raise ChildProcessError(f"{SCRIPT.name} ended with {self._process.wait()}")
        self._running: list[Fork] = []

    def start(
        self,
        *argv: object,
        variables: Mapping[str, str],
        directory: Path,
        die: tuple[str, signal.Signals] = NO_MOMENT,
        times: int = 1,
    ) -> list[Fork]:
        """Start a command, several times at once; all print to the first one's `stdout`."""
        pipe = self._pipe()
        stdout: TextIO | None = None
        started: list[Fork] = []
        for _ in range(times):
            state = self._send(argv, variables, directory, die, pipe, pipe)
            stdout = stdout or pipe.open(encoding="utf-8")
            started.append(Fork(state, None if started else stdout))
        self._running += started
        return started

    def call(
        self, *argv: object, variables: Mapping[str, str], directory: Path, timeout: float
    ) -> subprocess.CompletedProcess:
        """Run a command to its end.

        Raises:
            subprocess.TimeoutExpired: it does not come; the command is killed.
        """
        output, errors = self._path(), self._path()
        output.touch()
        errors.touch()
        fork = Fork(self._send(argv, variables, directory, NO_MOMENT, output, errors), None)
        try:
            code = fork.wait(timeout)
        finally:
            fork.kill()
        printed = output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8")
        return subprocess.CompletedProcess(["mlflow-dr", *map(str, argv)], code, *printed)

    def close(self) -> None:
        """End the process and kill what a failed test has left running."""
        for fork in self._running:
            if fork.stdout:
                fork.stdout.close()
            fork.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=120)

    def _send(
        self,
        argv: Sequence[object],
        variables: Mapping[str, str],
        directory: Path,
        die: tuple[str, signal.Signals],
        output: Path,
        errors: Path,
    ) -> BinaryIO:
        """The pipe that says how the command goes."""
        state, (moment, number) = self._pipe(), die
        order = {
            "argv": [str(word) for word in argv],
            "variables": {**self._variables, **variables},
            "directory": str(directory),
            "output": str(output),
            "errors": str(errors),
            "state": str(state),
            "moment": moment,
            "number": int(number),
        }
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return state.open("rb", buffering=0)

    def _path(self) -> Path:
        self._number += 1
        return self._directory / str(self._number)

    def _pipe(self) -> Path:
        path = self._path()
        os.mkfifo(path)
        return path
