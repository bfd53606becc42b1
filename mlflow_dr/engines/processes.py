"""The engine that encodes in several processes of this machine, each with a device."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlflow_dr.background import main_module_hidden
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.pool import Lost, WorkerPool
from mlflow_dr.engines.worker import Answer, ShardWorker, write_encoder


class WorkerProcess(NamedTuple):
    """A process, the connection to it, and the number of its device."""

    process: BaseProcess
    connection: Connection
    place: int


class ProcessEngine(WorkerPool[WorkerProcess]):
    """Does the work in one process for each device; see `Engine`.

    The processes start with the first pass. They share the threads that this process would use.

    Args:
        devices: of the same type.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices[0])
        self._devices = list(devices)
        self._free = set(range(len(devices)))
        self._folder = tempfile.TemporaryDirectory(prefix="mlflow_dr-")

    def count(self) -> int:
        """See `WorkerPool.count`."""
        return len(self._devices)

    def start(self) -> WorkerProcess:
        """See `WorkerPool.start`."""
        place = min(self._free)
        self._free.remove(place)
        ours, theirs = get_context("spawn").Pipe()
        threads = max(1, torch.get_num_threads() // len(self._devices))
        process = get_context("spawn").Process(
            target=_serve, args=(theirs, str(self._devices[place]), threads), daemon=True
        )
        with main_module_hidden(), _interrupts_ignored():
            process.start()
        theirs.close()
        return WorkerProcess(process, ours, place)

    def stop(self, handle: WorkerProcess) -> None:
        """See `WorkerPool.stop`."""
        handle.process.kill()
        handle.process.join()
        handle.connection.close()
        self._free.add(handle.place)

    def close(self) -> None:
        """End the processes, and remove the file of the encoder."""
        super().close()
        self._folder.cleanup()

    def save(self, encoder: Encoder, dtype: str) -> Path:
        """See `WorkerPool.save`; processes map the file, and share its memory."""
        path = Path(self._folder.name) / f"encoder-{self._encoder % 2}"
        path.unlink(missing_ok=True)  # a process that has mapped it keeps it
        with path.open("wb") as file:
            write_encoder(encoder, dtype, file)
        return path

    def share(self, value: Any) -> Any:
        """See `WorkerPool.share`."""
        return value

    def send(self, handle: WorkerProcess, request: str, *arguments: Any) -> None:
        """See `WorkerPool.send`."""
        with suppress(OSError):  # if the process has ended, `wait` finds that out
            handle.connection.send((request, arguments))

    def wait(self, handles: Sequence[WorkerProcess]) -> list[tuple[int, Answer | Lost]]:
        """See `WorkerPool.wait`."""
        ready = wait([handle.connection for handle in handles])
        return [
            (number, _received(handle))
            for number, handle in enumerate(handles)
            if handle.connection in ready
        ]


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let processes that start meanwhile leave Ctrl-C to this one; they inherit that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _received(handle: WorkerProcess) -> Answer | Lost:
    try:
        answer: Answer = handle.connection.recv()
    except (EOFError, OSError):
        handle.process.join()
        code = handle.process.exitcode or 0
        return Lost(signal.Signals(-code).name if code < 0 else f"exit code {code}")
    return answer


def _serve(connection: Connection, device: str, threads: int) -> None:
    """Answer requests until the other end is closed; the main function of a process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of FAISS, which is imported later
    worker = ShardWorker(torch.device(device), threads)
    with suppress(EOFError, OSError):  # the other end is closed, also while an answer is sent
        connection.send(Answer())
        while True:
            request, arguments = connection.recv()
            answer = worker.answer(request, *arguments)
            connection.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
