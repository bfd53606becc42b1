"""One cell of the study, measured in a fresh process: `python -m mlflow_dr.loaders.cell`.

    python -m mlflow_dr.loaders.cell SPEC.json RESULT.json

SPEC.json is written by `write_spec`. RESULT.json gets a flat object of names and numbers; what this
machine does not tell is left out. A cell that cannot be measured ends with exit code 2 and one line
on stderr.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from mlflow_dr.encoder.config import SHORTEST, check_types
from mlflow_dr.errors import MlflowDrError, UsageError, one_line, quoted
from mlflow_dr.terminal import one_line_of

T = TypeVar("T")
Figures = dict[str, Any]
"""What is measured, by name."""

MB = 1_000_000

PREFIX = "Error: "
"""Of the line on stderr that says why a cell is not measured."""
NO_MODEL = "none"
CHOICES = {
    "payload": ("lookup", "text", "ids"),
    "start_method": ("fork", "spawn", "forkserver"),
    "cache": ("warm", "cold"),
    "ranker": ("bi", "cross"),
    "backend": ("gloo", "nccl"),
}
SMALLEST = {
    **{"workers": 0, "prefetch": 1, "ranks": 1, "max_length": SHORTEST, "batch_size": 1},
    **{"samples": 1, "seconds": 0, "model_batches": 1, "seed": 0},
}


WRONG, INTERRUPTED, SIGNALLED = 2, 130, 128


@dataclass(frozen=True)
class Cell:
    """What differs between the cells of a study.

    Attributes:
        store: the document store's name.
        workers: processes or threads that fetch documents; 0 leaves it to the training process.
        threads: whether the workers are threads.
        payload: what arrives: `lookup` fetches documents and sends only their number and size,
            `text` sends their texts, `ids` their token ids, padded.
        start_method: how worker processes start: `fork`, `spawn` or `forkserver`.
        prefetch: batches that each worker makes ahead.
        pin_memory: whether batches are copied to pinned memory, from which a GPU copies faster.
        ramdisk: whether the store's files are copied to a RAM disk first.
        ranks: training processes, each with its own workers.
        cache: `cold` empties the page cache of the store's files first.
        model: an encoder's directory or hub name, trained on the batches; `none` trains nothing.
        ranker: `bi` compares the vectors of queries and documents; `cross` reads both as one text.

    Raises:
        UsageError: a value is not allowed, or does not go together with another one.
    """

    store: str = "lookup"
    workers: int = 0
    threads: bool = False
    payload: str = "ids"
    start_method: str = "fork"
    prefetch: int = 2
    pin_memory: bool = False
    ramdisk: bool = False
    ranks: int = 1
    cache: str = "warm"
    model: str = NO_MODEL
    ranker: str = "bi"

    def __post_init__(self) -> None:
        _check(self)
        if self.threads and not self.workers:
            raise UsageError("threads needs at least 1 worker")
        if self.store == "tokens" and self.payload == "text":
            raise UsageError("store 'tokens' has no texts; its payloads are lookup and ids")
        if self.ramdisk and self.cache == "cold":
            raise UsageError("a RAM disk is never cold; use cache warm")
        if self.model != NO_MODEL and self.payload != "ids":
            raise UsageError(f"a model takes payload ids, not {self.payload}")

    @property
    def label(self) -> str:
        """The store, and what is not as usual: `lookup, 2 workers, spawn`."""
        kind = "thread" if self.threads else "worker"
        parts = [
            self.store,
            *([f"{self.workers} {kind}{'s' * (self.workers > 1)}"] if self.workers else []),
            *([self.start_method] if self.start_method != "fork" else []),
            *([f"prefetch {self.prefetch}"] if self.prefetch != 2 else []),
            *(["pinned"] if self.pin_memory else []),
            *(["RAM disk"] if self.ramdisk else []),
            *([f"{self.ranks} ranks"] if self.ranks > 1 else []),
            *([self.cache] if self.cache != "warm" else []),
        ]
        return ", ".join(parts)

    @property
    def processes(self) -> int:
        """The number of worker processes of each rank."""
        return 0 if self.threads else self.workers


@dataclass(frozen=True)
class Workload:
    """What all cells of a study share.

    Attributes:
        directory: the directory of the cell's store, which differs between stores.
        rows: an .npy file of int64, the rows that are fetched, in this order.
        tokenizer: the directory or hub name of an encoder, whose tokenizer makes token ids.
        max_length: the most tokens of a document.
        batch_size: documents of a batch, on each rank.
        samples: the most documents of the supply pass, over all ranks.
        seconds: how long the supply pass takes, at most.
        model_batches: training steps with a model.
        seed: random seed of the model's dropout.
        device: auto, cpu, cuda or cuda:<n>.
        backend: how ranks communicate: `gloo` or `nccl`.

    Raises:
        UsageError: a value is not allowed.
    """

    directory: str
    rows: str
    tokenizer: str = ""
    max_length: int = 128
    batch_size: int = 64
    samples: int = 100_000
    seconds: float = 3.0
    model_batches: int = 20
    seed: int = 0
    device: str = "auto"
    backend: str = "gloo"

    def __post_init__(self) -> None:
        _check(self)


def write_spec(path: Path, cell: Cell, workload: Workload) -> None:
    """Write what a process of this module reads."""
    spec = {"cell": asdict(cell), "workload": asdict(workload)}
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")


def read_spec(path: Path) -> tuple[Cell, Workload]:
    """Read what `write_spec` wrote.

    Raises:
        UsageError: it cannot be read, or a key or value is not allowed.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        cell, workload = spec["cell"], spec["workload"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
    return _made(Cell, cell), _made(Workload, workload)


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"unknown key {quoted(unknown[0])}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:  # a value is missing
        raise UsageError(one_line(error)) from error


def _check(settings: Any) -> None:
    """Refuse values of another type, names that are unknown and numbers that are too small."""
    check_types(settings)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in CHOICES and value not in CHOICES[field.name]:
            expected = ", ".join(CHOICES[field.name])
            raise UsageError(f"{field.name} {quoted(value)}: expected {expected}")
        if field.name in SMALLEST and value < SMALLEST[field.name]:
            raise UsageError(f"{field.name} is {value}; expected at least {SMALLEST[field.name]}")


def measure_cell(arguments: Sequence[str] | None = None) -> int:
    """Measure the cell of a spec, and write its figures.

    Args:
        arguments: the paths of the spec and of the result; those of the command line when None.

    Returns:
        The exit code: 0, or 2 after a message on stderr.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, end_process)
    try:
        if len(given) != 2:
            raise UsageError("expected python -m mlflow_dr.loaders.cell SPEC.json RESULT.json")
        from mlflow_dr.loaders.measuring import measured

        figures = measured(*read_spec(Path(given[0])))
        Path(given[1]).write_text(json.dumps(figures), encoding="utf-8")
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - every error of a cell is one line of the study
        print(f"{PREFIX}{message_of(error)}", file=sys.stderr)  # noqa: T201
        return WRONG
    return 0


def end_process(number: int, frame: FrameType | None) -> None:
    """End this process by an exception, so that copies on a RAM disk are removed."""
    raise SystemExit(SIGNALLED + number)


def message_of(error: Exception) -> str:
    """An error on one line; of one in a worker process, what was raised there."""
    text = str(error)
    if text.startswith("Caught "):  # torch puts the worker's traceback into the message
        return one_line_of(text.strip().splitlines()[-1].removeprefix("mlflow_dr.errors."), 500)
    return one_line_of(text, 500) if isinstance(error, MlflowDrError) else one_line(error)


def process_failure(status: int, messages: str) -> str:
    """Why a process of `measure_cell` failed, from its exit status and what it wrote to stderr."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line for line in messages.splitlines() if line.strip()]
    return one_line_of(lines[-1], 500).removeprefix(PREFIX) if lines else f"exit code {status}"


def end_processes(processes: Sequence[subprocess.Popen[Any]], seconds: float) -> None:
    """End the processes that have not ended: by SIGTERM, and after some seconds by SIGKILL."""
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()


if __name__ == "__main__":
    code = measure_cell()
    gc.freeze()  # the interpreter's last collection takes a while with torch imported
    sys.exit(code)
