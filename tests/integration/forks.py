"""Commands in forks of one process (`forked_commands.py`), as tests start, read and end them."""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO

import psutil
from asking import ask, write_stand_ins
from filelock import FileLock

SCRIPT = Path(__file__).parent / "forked_commands.py"
SECONDS_TO_BEGIN = 300
SECONDS_FOR_A_COMMAND = 600
READY = "ready\n"
NO_MOMENT = ("nowhere", signal.SIGKILL)


class Fork:
    """A command; what tests use of `subprocess.Popen`.

    Attributes:
        pid: its process id.
        returncode: how it ended, once that was asked.
        stdout: what it prints, if that is read here.
    """

    def __init__(self, connection: socket.socket, stdout: TextIO | None) -> None:
        self.returncode: int | None = None
        self.stdout = stdout
        self._connection = connection
        self._answers = connection.makefile("rb", buffering=0)
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
            self._answers.close()
            self._connection.close()
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
        waiting = select.poll()  # select() takes no descriptor above 1,023
        waiting.register(self._connection, select.POLLIN)
        if not waiting.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired(["a fork"], timeout or 0)
        if not (line := self._answers.readline()):
            raise ChildProcessError("the attendant of the command has died")
        return int(line)


class Forks:
    """The process that forks; it is started if no other process of this test run has started it.

    Args:
        variables: what the commands see of the environment.
        directory: of the process; the same in all processes of a test run.

    Raises:
        ChildProcessError: it has not come to begin.
    """

    def __init__(self, variables: Mapping[str, str], directory: Path) -> None:
        self._running: list[Fork] = []
        self._directory = directory
        stand_ins = directory / "bin"
        path = f"{stand_ins}{os.pathsep}{variables['PATH']}"
        self._variables = {**variables, "PATH": path}
        with FileLock(f"{directory}.lock"):
            directory.mkdir(exist_ok=True)
            self._used = socket.socket(socket.AF_UNIX)
            try:
                self._used.connect(str(directory / "users"))
            except OSError:
                self._begin(variables)
                stand_ins.mkdir(exist_ok=True)
                write_stand_ins(stand_ins, str(directory / "commands"))
                self._used.connect(str(directory / "users"))

    def _begin(self, variables: Mapping[str, str]) -> None:
        for name in ("users", "commands"):
            (self._directory / name).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, SCRIPT, self._directory],
            stdout=subprocess.PIPE,
            env=dict(variables),
            text=True,
            start_new_session=True,
        )
        with process.stdout as printed:
            if printed.readline() != READY:  # its errors go where pytest's do
                raise ChildProcessError(f"{SCRIPT.name} ended with {process.wait()}")
        process.returncode = 0  # it ends after its last user

    def start(
        self,
        *argv: object,
        variables: Mapping[str, str],
        directory: Path,
        die: tuple[str, signal.Signals] = NO_MOMENT,
        output: IO[str] | None = None,
    ) -> Fork:
        """Start a command, which prints to a file or, without one, to its `stdout`."""
        if output is not None:
            return self._ask(argv, variables, directory, die, output.fileno(), output.fileno())
        (fork,) = self.start_several(*argv, variables=variables, directory=directory, die=die)
        return fork

    def start_several(
        self,
        *argv: object,
        variables: Mapping[str, str],
        directory: Path,
        die: tuple[str, signal.Signals] = NO_MOMENT,
        times: int = 1,
    ) -> list[Fork]:
        """Start a command several times at once; all print to the first one's `stdout`."""
        reading, writing = os.pipe()
        stdout = open(reading, encoding="utf-8")  # noqa: PTH123, SIM115 - the fork closes it
        started: list[Fork] = []
        try:
            for _ in range(times):
                fork = self._ask(argv, variables, directory, die, writing, writing)
                started.append(fork)
        finally:
            os.close(writing)
        started[0].stdout = stdout
        return started

    def call(
        self,
        *argv: object,
        variables: Mapping[str, str],
        directory: Path,
        timeout: float = SECONDS_FOR_A_COMMAND,
    ) -> subprocess.CompletedProcess:
        """Run a command to its end.

        Raises:
            subprocess.TimeoutExpired: it does not come; the command is killed.
        """
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            fork = self._ask(
                argv, variables, directory, NO_MOMENT, output.fileno(), errors.fileno()
            )
            try:
                code = fork.wait(timeout)
            finally:
                fork.kill()
            printed = []
            for file in (output, errors):
                file.seek(0)
                printed.append(file.read())
        return subprocess.CompletedProcess([str(word) for word in argv], code, *printed)

    def close(self) -> None:
        """Kill what a failed test has left running; the process ends after its last user."""
        for fork in self._running:
            if fork.stdout:
                fork.stdout.close()
            fork.kill()
        self._used.close()

    def _ask(
        self,
        argv: tuple[object, ...],
        variables: Mapping[str, str],
        directory: Path,
        die: tuple[str, signal.Signals],
        output: int,
        errors: int,
    ) -> Fork:
        moment, number = die
        order = {
            "argv": [str(word) for word in argv],
            "variables": {**self._variables, **variables},
            "directory": str(directory),
            "moment": moment,
            "number": int(number),
        }
        with open(os.devnull) as nothing:  # noqa: PTH123
            files = [nothing.fileno(), output, errors]
            connection = ask(str(self._directory / "commands"), order, files)
        fork = Fork(connection, None)
        self._running.append(fork)
        return fork
