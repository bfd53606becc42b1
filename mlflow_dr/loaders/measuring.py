"""The figures of one cell: opening its store, supplying batches, and training on them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_dr.errors import ChildError, DataError, DeviceError, UsageError, one_line
from mlflow_dr.loaders.cell import MB, NO_MODEL, Cell, Figures, Workload
from mlflow_dr.loaders.page_cache import evict, ram_disk, read_ahead_kb
from mlflow_dr.loaders.ranks import Rank, measured_by_ranks
from mlflow_dr.process_tree import tree_read_bytes
from mlflow_dr.stores.store import STORES, DocumentStore, open_store


def measured(cell: Cell, workload: Workload) -> Figures:
    """Measure one cell in this process, or by its ranks.

    Args:
        cell: the cell.
        workload: what it loads.

    Returns:
        Numbers by name, and `memory_series`, pairs of documents and MB of private memory. Sizes in
        MB are of 1,000,000 bytes. What this machine does not tell is left out.

    Raises:
        UsageError: this machine cannot measure it, or there are too few rows.
        DataError: a file is missing or damaged.
        ChildError: a rank failed.
    """
    rank = Rank.of_this_process()
    if rank.world_size > 1:
        rank.end_with_parent()
        return _measured_here(cell, workload, rank)
    _check(cell, workload)
    directory = Path(workload.directory)
    with ExitStack() as ending:
        if cell.ramdisk:
            directory = ending.enter_context(ram_disk(directory))
        files = open_store(cell.store, directory).files()
        disk_mb = sum(path.stat().st_size for path in files) / MB
        if cell.cache == "cold":
            evict(files)
        work = replace(workload, directory=str(directory))
        figures = (
            measured_by_ranks(cell, work) if cell.ranks > 1 else _measured_here(cell, work, rank)
        )
    figures["disk_mb"] = disk_mb
    ahead = read_ahead_kb(Path(workload.directory))
    return figures if ahead is None else {**figures, "read_ahead_kb": ahead}


def _check(cell: Cell, workload: Workload) -> None:
    """Refuse what this machine cannot measure, before anything is copied."""
    if sys.platform != "linux":
        raise UsageError(
            "measuring how documents are loaded needs Linux, which says what they take"
        )
    STORES.get(cell.store)
    if not Path(workload.directory).is_dir():
        raise UsageError(f"{workload.directory}: no directory of the document store {cell.store!r}")
    if cell.pin_memory:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("pinned memory needs a CUDA device; this machine has none")


def _measured_here(cell: Cell, workload: Workload, rank: Rank) -> Figures:
    rows = _rows(workload, rank)
    # imports torch, which takes a second
    from mlflow_dr.loaders.feed import Batches, Feed, Loading
    from mlflow_dr.loaders.supply import SupplyPass

    with open_store(cell.store, Path(workload.directory)) as store:
        tokenizer, pad_id = _tokenizer(cell, workload, store)
        figures = _opened(store, rows)
        feed = Feed(store, cell.payload, tokenizer, pad_id, workload.max_length, cell.workers)
        batches = Batches(rows, workload.batch_size)
        loading = Loading(
            cell.workers, cell.threads, cell.start_method, cell.prefetch, cell.pin_memory
        )
        rank.meet(workload.backend)
        supply = SupplyPass(feed, batches, loading)
        with _lost_workers():
            supplied, following = supply.measure(workload.seconds)
            figures |= supplied
            if cell.model != NO_MODEL:
                # loaded now, so that its memory is none of the supply's
                training = _training_pass(cell, workload, rank)
                steps = min(workload.model_batches, len(batches) - 2)
                figures |= training.measure(following, steps)
                figures["headroom"] = figures["samples_per_s"] / figures["model_samples_per_s"]
        rank.leave()
    return {**figures, **_pinned_memory()} if cell.pin_memory else figures


def _pinned_memory() -> Figures:
    """The most pinned memory so far; nothing where this version of torch does not say."""
    import torch

    with suppress(AttributeError, KeyError):
        return {"pinned_mb": torch.cuda.host_memory_stats()["allocated_bytes.peak"] / MB}
    return {}


@contextmanager
def _lost_workers() -> Iterator[None]:
    """Say what it means that a worker process does not answer any more."""
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if str(error).startswith("Caught "):
            raise  # the worker's own error
        raise ChildError(
            f"a worker process ended before it should ({one_line(error)}); it may have been "
            "killed because memory ran out"
        ) from error


def _rows(workload: Workload, rank: Rank) -> np.ndarray:
    """The rows of a rank, `(n,) int64`: every n-th of the first ones of the file."""
    try:
        rows = np.asarray(np.load(workload.rows, mmap_mode="r"))  # np.memmap's slices are slow
    except (OSError, ValueError) as error:
        raise DataError(f"{workload.rows}: cannot be read ({one_line(error)})") from error
    if rows.ndim != 1 or rows.dtype != np.int64:
        raise DataError(f"{workload.rows}: expected one row of int64, found {rows.dtype}")
    return rows[: workload.samples][rank.number :: rank.world_size]


def _opened(store: DocumentStore, rows: np.ndarray) -> Figures:
    """Open a store by reading its first document, and see how long that takes."""
    read_before = tree_read_bytes(os.getpid())
    began = time.monotonic()
    store.get_many(rows[:1])
    open_s = time.monotonic() - began
    return {"open_s": open_s, "open_read_mb": (tree_read_bytes(os.getpid()) - read_before) / MB}


def _tokenizer(cell: Cell, workload: Workload, store: DocumentStore) -> tuple[Any, int]:
    """What makes token ids, if the cell needs any made, and the id that pads."""
    if cell.payload != "ids" or (store.holds == "tokens" and cell.model == NO_MODEL):
        return None, 0  # any id pads as well where no model reads it
    from mlflow_dr.loaders.documents import document_tokenizer

    made = document_tokenizer(workload.tokenizer or cell.model, workload.max_length)
    return (None if store.holds == "tokens" else made), made.pad_id


def _training_pass(cell: Cell, workload: Workload, rank: Rank) -> Any:
    """The model of a cell, ready to be trained."""
    import torch

    from mlflow_dr.devices import resolve_device
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.loaders.steps import Ranker, TrainingPass

    torch.manual_seed(workload.seed)
    device = resolve_device(workload.device)
    if device.type == "cuda" and rank.world_size > 1:
        device = resolve_device(f"cuda:{rank.number}")
    encoder = load_encoder(cell.model, passage_max_length=workload.max_length)
    ranker = Ranker(encoder, cell.ranker == "cross")
    return TrainingPass(ranker, device, cell.pin_memory, rank.world_size)
