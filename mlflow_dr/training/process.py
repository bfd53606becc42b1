"""A training process: the signals that end it, its GPU, and its process group."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import distributed
from transformers import TrainingArguments

from mlflow_dr import compat
from mlflow_dr.training.callbacks import StopCallback

log = logging.getLogger(__name__)


SECONDS_OF_ONE_REQUEST = 1.0
STDERR = 2


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Have Trainer use one GPU in each process; with more it would use DataParallel."""
    if arguments.n_gpu > 1:
        log.warning("%d GPUs are visible; training uses the first one", arguments.n_gpu)
        compat.use_devices(arguments, 1)


def leave_group() -> None:
    """End the process group; at the exit of the interpreter its threads may abort the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def stop_on_signals(stop: StopCallback, says: bool) -> Iterator[None]:
    """On SIGINT or SIGTERM end cleanly after the step; on a second signal, end at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun. Signals reach the
    main thread alone; in any other thread nothing is done.

    Args:
        stop: a callback of the trainer.
        says: whether this process says on stderr that it is stopping.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first_times: dict[int, float] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        first = first_times.setdefault(number, time.monotonic())
        if time.monotonic() - first > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt
        if says and not stop.killed:
            # not by print: the signal may have come amid a write to the stream
            os.write(STDERR, b"stopping after this step; send the signal again to stop at once\n")
        stop.ask(signal.Signals(number).name, killed=True)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
