"""The configuration of `mlflow-dr loaders`, and the cells that it asks for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mlflow_dr.config import Config, ConfigError, Flag, as_tuple, checked, within
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.fields import (
    Count,
    Dataset,
    Device,
    File,
    Length,
    Seed,
    TrackingUri,
)
from mlflow_dr.loaders.cell import NO_MODEL, Cell
from mlflow_dr.stores.store import STORES

THREADS = "threads:"
MOST_WORKERS = 1024
YesNo = Literal["no", "yes"]


class Workers(NamedTuple):
    """How many workers load documents, and whether they are threads."""

    number: int
    threads: bool


def parse_workers(text: str) -> Workers:
    """Read `0`, `4` or `threads:4`.

    Raises:
        UsageError: it is something else.
    """
    number = text.removeprefix(THREADS)
    threads = number != text
    if not number.isdecimal() or int(number) > MOST_WORKERS or (threads and not int(number)):
        raise UsageError(
            f"workers {quoted(text)} are not a number of processes, such as 0 or 2, or of threads, "
            f"such as {THREADS}2"
        )
    return Workers(int(number), threads)


def _check_store(name: str) -> None:
    STORES.get(name)


Stores = Annotated[
    tuple[Annotated[str, AfterValidator(checked(_check_store))], ...], BeforeValidator(as_tuple)
]
WorkerCounts = Annotated[
    tuple[Annotated[str, AfterValidator(checked(parse_workers))], ...], BeforeValidator(as_tuple)
]
USUAL = ("memory", "lookup", "ir_datasets", "arrow", "tokens")
USUALLY_TRAINED = ("lookup", "lookup, 2 workers", "tokens", "tokens, 2 workers")
AXES = ("workers", "start_method", "prefetch", "pin_memory", "ramdisk", "ranks", "cache")


class LoadersConfig(Config):
    """`mlflow-dr loaders`: which ways of loading documents are compared, and on what."""

    dataset: Dataset = "demo"
    passages: Count | None = None
    """Add generated passages, made of words of the dataset, up to this number of passages."""
    store: Stores = ()
    """Document stores: memory, lookup, lookup:pread, ir_datasets, arrow, corpus, tokens, null, and
    with their extras zstd, lmdb, lance. Of this and the next seven options every combination is a
    cell of the study (default: the cells of the guide)."""
    workers: WorkerCounts = ()
    """Worker processes that load: 0, 2, ...; threads:2 for threads of the training process."""
    start_method: Annotated[
        tuple[Literal["fork", "spawn", "forkserver"], ...], BeforeValidator(as_tuple)
    ] = ()
    """How worker processes are started: fork, spawn or forkserver."""
    prefetch: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = ()
    """Batches that each worker loads ahead."""
    pin_memory: Annotated[tuple[YesNo, ...], BeforeValidator(as_tuple)] = ()
    """no or yes: batches in pinned memory, for a GPU."""
    ramdisk: Annotated[tuple[YesNo, ...], BeforeValidator(as_tuple)] = ()
    """no or yes: a copy of the store in /dev/shm."""
    ranks: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = ()
    """Training processes that share the samples."""
    cache: Annotated[tuple[Literal["warm", "cold"], ...], BeforeValidator(as_tuple)] = ()
    """warm or cold: whether the store's files are in memory when a cell begins."""
    payload: Literal["ids", "text", "lookup"] = "ids"
    """What reaches the training process: padded token ids, texts, or nothing (lookup only)."""
    model: str = "none"
    """Train this encoder for a few batches, to compare what the loader supplies with
    what the model takes: a directory, a hub name, or tiny."""
    ranker: Literal["bi", "cross"] = "bi"
    """Query and document one by one with in-batch negatives, or as one text."""
    model_batches: Count = 2
    """Training steps of a cell, in the first repeat."""
    tokenizer: Annotated[str | None, Flag("--tokenizer", "--tokenizer-name-or-path")] = None
    """The tokenizer of this directory or hub name (default: the model's, else one that is learnt
    from the passages)."""
    max_length: Length = 128
    """Longest document, in tokens."""
    batch_size: Count = 64
    """Documents of a batch."""
    samples: Count = 300_000
    """Documents that a cell loads at most."""
    seconds: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """How long a cell loads at most, from its first batch."""
    repeats: Annotated[Count, Flag("--repeats")] = 3
    """How often each cell is measured; the table has medians."""
    seed: Seed = 0
    device: Device = "cpu"
    backend: Literal["gloo", "nccl"] = "gloo"
    """How several ranks talk."""
    output: File | None = None
    """A folder for the report, the table and four figures."""
    no_log: bool = False
    """Write nothing to MLflow."""
    run_name: str | None = None
    """The name of the MLflow run."""
    experiment_name: str | None = None
    """The MLflow experiment."""
    force: bool = False
    """Begin anew, even if a study of these cells was interrupted."""
    tracking_uri: TrackingUri = None

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        with within("cells"):
            cells = self.cells
        for cell in cells:
            forks = cell.processes and cell.start_method == "fork"
            if forks and not STORES.get(cell.store).works_in_forks:
                raise ConfigError(
                    "start_method",
                    f" is fork, which the store {cell.store} does not survive; "
                    "use spawn or forkserver",
                )
        if self.tokenizer and self.model != NO_MODEL:
            raise ConfigError("tokenizer", " cannot be chosen with --model, which has its own")
        return self

    @property
    def cells(self) -> list[Cell]:
        """What is compared."""
        if not self.store and not any(getattr(self, axis) for axis in AXES):
            return self._usual_cells()
        values = (
            self.store or USUAL,
            self.workers or ("0",),
            self.start_method or ("fork",),
            self.prefetch or (2,),
            self.pin_memory or ("no",),
            self.ramdisk or ("no",),
            self.ranks or (1,),
            self.cache or ("warm",),
        )
        cells = [self._cell(*combination) for combination in product(*values)]
        return list(dict.fromkeys(cells))

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a cell has token ids."""
        return any(cell.payload == "ids" or cell.store == "tokens" for cell in self.cells)

    def _usual_cells(self) -> list[Cell]:
        """Every usual store with and without workers, and four others.

        The model is trained in some of them only, because loading it takes longer than the rest.
        """
        cells = [
            *(self._cell(store, workers) for store in USUAL for workers in ("0", "2")),
            self._cell("tokens", f"{THREADS}2"),
            self._cell("memory", "2", start_method="forkserver"),
            self._cell("lookup", "0", ramdisk="yes"),
            self._cell("lookup", "0", ranks=2),
        ]
        return [
            cell if cell.label in USUALLY_TRAINED else replace(cell, model=NO_MODEL)
            for cell in cells
        ]

    def _cell(
        self,
        store: str,
        workers: str,
        start_method: str = "fork",
        prefetch: int = 2,
        pin_memory: YesNo = "no",
        ramdisk: YesNo = "no",
        ranks: int = 1,
        cache: str = "warm",
    ) -> Cell:
        number, threads = parse_workers(workers)
        return Cell(
            store=store,
            workers=number,
            threads=threads,
            payload=self.payload,
            # without worker processes there is nothing to start or to load ahead
            start_method=start_method if number and not threads else "fork",
            prefetch=prefetch if number else 2,
            pin_memory=pin_memory == "yes",
            ramdisk=ramdisk == "yes",
            ranks=ranks,
            cache=cache,
            model=self.model,
            ranker=self.ranker,
        )
