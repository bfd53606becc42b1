"""Batches of documents from a store, made in this process, by worker processes or by threads."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.stores.store import DocumentStore
from mlflow_dr.training.batches import padded

LOOKUP, TOKENIZE, COLLATE = PARTS = range(3)
# the other columns of what workers write down
START_CPU, READY, CLOCK = range(3, 6)
COLUMNS = 6


class WorkerTimes(NamedTuple):
    """Seconds of all workers.

    Attributes:
        parts: CPU seconds of lookup, tokenising and collating so far, `(3,) float64`.
        cpu: CPU seconds of the workers themselves so far, whatever they do.
        start_cpu: CPU seconds until they were ready.
        ready: when the last one was ready, by `time.monotonic`.
    """

    parts: np.ndarray
    cpu: float
    start_cpu: float
    ready: float


class Feed:
    """Makes one batch of rows, and writes down the CPU time that each part takes.

    It is what a `DataLoader` calls its dataset.

    Args:
        store: the documents.
        payload: `lookup`, `text` or `ids`.
        tokenizer: makes token ids of texts; None if the store has them, or the payload needs none.
        pad_id: token id that pads documents.
        max_length: the most tokens of a document.
        workers: the number of workers; 0 for none.
    """

    def __init__(
        self,
        store: DocumentStore,
        payload: str,
        tokenizer: TextTokenizer | None,
        pad_id: int,
        max_length: int,
        workers: int,
    ) -> None:
        self._store = store
        self._payload = payload
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._max_length = max_length
        # in shared memory, where worker processes write and this one reads
        self._table = torch.zeros(max(1, workers), COLUMNS, dtype=torch.float64).share_memory_()
        self._seconds: Any = None

    def __getitems__(self, rows: Sequence[int]) -> Any:
        """The batch of these rows, made by this process."""
        worker = get_worker_info()
        return self.batch(rows, worker.id if worker else 0)

    def batch(self, rows: Sequence[int], worker: int) -> Any:
        """The batch of these rows.

        Args:
            rows: rows of the store.
            worker: the number of the worker that makes it.

        Returns:
            For `lookup` the number of documents and of their characters (or tokens); for `text`
            their texts; for `ids` `input_ids` and `attention_mask`, `(n_rows, length) int64`.
        """
        began = time.thread_time()
        documents: Any = self._store.get_many(rows)
        if self._payload == "lookup":
            batch = len(documents), self._size(documents)
            self._spent(worker, LOOKUP, began)
            return batch
        began = self._spent(worker, LOOKUP, began)
        if self._tokenizer is not None:
            documents = self._tokenizer.passage_ids(documents)
            began = self._spent(worker, TOKENIZE, began)
        if self._payload == "text":
            documents = _texts(documents)
        else:
            documents = padded([ids[: self._max_length] for ids in documents], self._pad_id)
        self._spent(worker, COLLATE, began)
        return documents

    def _size(self, documents: Sequence[Any]) -> int:
        if self._has_ids:
            return sum([len(ids) for ids in documents])
        return sum([len(passage.text) for passage in documents])

    def _spent(self, worker: int, part: int, began: float) -> float:
        """Write down the CPU time of a part until now, and return the time."""
        now = time.thread_time()
        if self._seconds is None:
            # faster than an array, for a few microseconds count here
            self._seconds = memoryview(self._table.view(-1).numpy())
        self._seconds[worker * COLUMNS + part] += now - began
        return now

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seconds": None}

    @property
    def _has_ids(self) -> bool:
        return self._store.holds == "tokens"

    def begin(self, worker: int, clock: int, cpu: float) -> None:
        """Write down that a worker is ready.

        Args:
            worker: its number.
            clock: the clock of its CPU time, for `time.clock_gettime`.
            cpu: the CPU seconds that it has taken until now.
        """
        self._table[worker, START_CPU:] = torch.tensor(
            [cpu, time.monotonic(), clock], dtype=torch.float64
        )

    def times(self) -> WorkerTimes:
        """What all workers have taken so far; their clocks are read, so they must be alive."""
        table = self._table.numpy()
        clocks = [int(clock) for clock in table[:, CLOCK] if clock]
        return WorkerTimes(
            table[:, PARTS].sum(axis=0),
            sum(map(time.clock_gettime, clocks)),
            float(table[:, START_CPU].sum()),
            float(table[:, READY].max()),
        )


def _texts(passages: Sequence[Any]) -> list[str]:
    return [f"{passage.title} {passage.text}".lstrip() for passage in passages]


class Batches:
    """Rows in their order, a batch at a time, until the rows or the time end.

    Rows that do not fill a batch are left out.

    Args:
        rows: the rows, `(n,) int64`.
        size: rows of a batch.

    Attributes:
        deadline: no batch is handed out later, by `time.monotonic`; set when the clock starts.
        size: rows of a batch.
        handed_out: batches of this epoch so far.
        complete: whether the last batch of this epoch has been handed out.
    """

    def __init__(self, rows: np.ndarray, size: int) -> None:
        self._rows = rows
        self.size = size
        self.deadline = math.inf
        self.handed_out = 0
        self.complete = False

    def __len__(self) -> int:
        return len(self._rows) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        self.handed_out, self.complete = 0, False
        for number in range(len(self)):
            self.handed_out += 1
            # known before the batch is made, so that its consumer knows that it is the last
            self.complete = number + 1 == len(self) or time.monotonic() >= self.deadline
            yield self._rows[number * self.size : (number + 1) * self.size].tolist()
            if self.complete:
                return


@dataclass(frozen=True)
class Loading:
    """How batches are made ahead.

    Attributes:
        workers: processes or threads; 0 makes each batch when it is asked for.
        threads: whether the workers are threads.
        start_method: how worker processes start.
        prefetch: batches that each worker makes ahead.
        pin_memory: whether batches are copied to pinned memory.
    """

    workers: int
    threads: bool
    start_method: str
    prefetch: int
    pin_memory: bool


def batch_loader(feed: Feed, batches: Batches, loading: Loading) -> DataLoader[Any] | ThreadLoader:
    """What gives the batches of an epoch each time it is iterated.

    Worker processes are those of training's default: torch's `DataLoader`, with new workers for
    each epoch.
    """
    if loading.threads:
        return ThreadLoader(feed, batches, loading)
    options: dict[str, Any] = {}
    if loading.workers:
        options = {
            "num_workers": loading.workers,
            "multiprocessing_context": loading.start_method,
            "prefetch_factor": loading.prefetch,
            "worker_init_fn": _begin_process,
        }
    dataset: Any = feed
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_made,
        pin_memory=loading.pin_memory,
        **options,
    )


def _as_made(batch: Any) -> Any:
    return batch


def _begin_process(worker: int) -> None:
    """Called in a new worker process."""
    information: Any = get_worker_info()
    # the clock of a process, as clock_getcpuclockid(3) makes it of its id
    information.dataset.begin(worker, ~os.getpid() << 3 | 2, time.process_time())


class ThreadLoader:
    """A data loader whose workers are threads; batches keep their order.

    Args:
        feed: makes the batches.
        batches: the rows of each batch.
        loading: how many threads, and batches that each makes ahead.
    """

    def __init__(self, feed: Feed, batches: Batches, loading: Loading) -> None:
        self._feed = feed
        self._batches = batches
        self._loading = loading
        self._local = threading.local()

    def __iter__(self) -> Iterator[Any]:
        numbers = count()
        workers = self._loading.workers
        rows = iter(self._batches)
        waiting: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(workers, initializer=self._begin, initargs=(numbers,))
        try:
            for some in islice(rows, workers * self._loading.prefetch):
                waiting.append(pool.submit(self._made, some))
            while waiting:
                batch = waiting.popleft().result()
                for some in islice(rows, 1):
                    waiting.append(pool.submit(self._made, some))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, numbers: Iterator[int]) -> None:
        self._local.worker = next(numbers)
        clock = time.pthread_getcpuclockid(threading.get_ident())
        self._feed.begin(self._local.worker, clock, time.thread_time())

    def _made(self, rows: Sequence[int]) -> Any:
        batch = self._feed.batch(rows, self._local.worker)
        if self._loading.pin_memory and isinstance(batch, dict):
            return {name: values.pin_memory() for name, values in batch.items()}
        return batch
