"""What supplying batches takes: rates, CPU time by part, waiting and memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr.errors import UsageError
from mlflow_dr.loaders.cell import MB, Figures
from mlflow_dr.loaders.feed import COLLATE, LOOKUP, TOKENIZE, Batches, Feed, Loading, batch_loader
from mlflow_dr.process_tree import (
    MemoryUse,
    Sampler,
    TreeSample,
    tree_cpu,
    tree_memory,
    tree_read_bytes,
)

SAMPLES_OF_SLOPE = 100_000
SAMPLING_SECONDS = 0.5
# reading memory takes longer during the pass than before it, when its time is measured
MEMORY_SHARE = 1 / 600


class Clocks(NamedTuple):
    """Seconds at one time.

    Attributes:
        wall: by `time.monotonic`.
        process: CPU seconds of this process with all of its threads.
        sampler: CPU seconds of the thread that reads memory.
        lookup: CPU seconds of reading documents, in whichever process or thread.
        tokenize: CPU seconds of making token ids.
        collate: CPU seconds of padding.
        workers: CPU seconds of the worker processes or threads, whatever they do.
        tree: CPU seconds of this process and those below it, by `/proc`.
    """

    wall: float
    process: float
    sampler: float
    lookup: float
    tokenize: float
    collate: float
    workers: float
    tree: float


class SupplyPass:
    """One epoch over the rows, by a consumer that takes the batches and does nothing with them.

    The clock of rates, CPU time and waiting starts when all workers are at work: after the first
    batch, and after those made ahead while the memory is read. It ends with the last batch, when
    the workers have nothing left to do. So starting workers is not part of the rates.

    Args:
        feed: makes the batches.
        batches: their rows.
        loading: the workers.
    """

    def __init__(self, feed: Feed, batches: Batches, loading: Loading) -> None:
        self._feed = feed
        self._batches = batches
        self._loading = loading
        self._loader = batch_loader(feed, batches, loading)

    def measure(self, seconds: float) -> tuple[Figures, Iterator[Any]]:
        """Do the pass.

        Args:
            seconds: the most seconds from the clock's start.

        Returns:
            The figures, and the batches of a second epoch after its first one.

        Raises:
            UsageError: there are too few rows for the clock to start.
        """
        self._check_batches()
        read_before = tree_read_bytes(os.getpid())
        began = time.monotonic()
        iterator = iter(self._loader)
        next(iterator)
        first_batch_s = time.monotonic() - began
        with Sampler(pause=SAMPLING_SECONDS, memory_share=MEMORY_SHARE) as sampler:
            sampler.first()  # so that the pass has no more readings than it is long enough for
            for _ in range(self._made_ahead):
                next(iterator)
            workers = self._feed.times()
            start = self._clocks(sampler)
            self._batches.deadline = start.wall + seconds
            waits = self._take_all(iterator)
            end = self._clocks(sampler)
        last = tree_memory(os.getpid())
        read_bytes = tree_read_bytes(os.getpid()) - read_before
        figures = {
            "first_batch_s": first_batch_s,
            "start_s": max(0.0, workers.ready - began),
            "cpu_start_s": workers.start_cpu,
            **rates(start, end, len(waits) * self._batches.size, self._loading),
            "batches": len(waits),
            **cpu_parts(start, end, self._loading),
            **wait_percentiles(waits),
            **self._memory(start, end, list(sampler.samples), last),
            "read_mb": read_bytes / MB,
            "read_kb_per_sample": read_bytes / 1024 / self._samples,
        }
        return self._second_epoch(iterator, figures)

    @property
    def _samples(self) -> int:
        return self._batches.handed_out * self._batches.size

    @property
    def _made_ahead(self) -> int:
        return self._loading.workers * self._loading.prefetch

    def _check_batches(self) -> None:
        needed = 3 + self._made_ahead
        if len(self._batches) < needed:
            raise UsageError(
                f"{len(self._batches)} batches of {self._batches.size} documents are too few to "
                f"measure {self._loading.workers} workers, which need {needed}; fetch more "
                "documents or make smaller batches"
            )

    def _clocks(self, sampler: Sampler) -> Clocks:
        times = self._feed.times()
        return Clocks(
            time.monotonic(),
            time.process_time(),
            sampler.cpu_s,
            float(times.parts[LOOKUP]),
            float(times.parts[TOKENIZE]),
            float(times.parts[COLLATE]),
            times.cpu,
            tree_cpu(os.getpid()),
        )

    def _take_all(self, iterator: Iterator[Any]) -> list[float]:
        """Take the batches until the last one of the epoch; returns the seconds of each wait."""
        waits = []
        taken = 1 + self._made_ahead
        while not (self._batches.complete and taken == self._batches.handed_out):
            began = time.monotonic()
            next(iterator)
            waits.append(time.monotonic() - began)
            taken += 1
        return waits

    def _second_epoch(
        self, iterator: Iterator[Any], figures: Figures
    ) -> tuple[Figures, Iterator[Any]]:
        """Begin the next epoch as a training does, which ends the workers and starts new ones."""
        self._batches.deadline = math.inf
        began = time.monotonic()
        for _ in iterator:
            raise RuntimeError("a batch came after the last one")
        del iterator
        following = iter(self._loader)
        next(following)
        return {**figures, "epoch_stall_s": time.monotonic() - began}, following

    def _memory(
        self, start: Clocks, end: Clocks, samples: Sequence[TreeSample], last: MemoryUse
    ) -> Figures:
        """Memory by pages, at the first batch, meanwhile and after the last one."""
        size = self._batches.size
        taken = (size, size * (1 + self._made_ahead), self._samples)
        times = (samples[0].time if samples else start.wall, start.wall, end.wall)
        points = [
            [float(np.interp(sample.time, times, taken)), sample.private / MB]
            for sample in samples
            if sample.by_pages and sample.time < end.wall
        ]
        points.append([float(self._samples), last.private / MB])
        counts, private = np.array(points).T
        slope = np.polyfit(counts, private, 1)[0] if len(points) > 1 else 0.0
        return {
            "private_start_mb": points[0][1],
            "private_end_mb": last.private / MB,
            "private_peak_mb": max([*private, *(sample.private / MB for sample in samples)]),
            "private_mb_per_100k": float(slope) * SAMPLES_OF_SLOPE,
            "file_mb": last.file / MB,
            "shmem_mb": last.shmem / MB,
            "locked_mb": last.locked / MB,
            "memory_series": points,
        }


def rates(start: Clocks, end: Clocks, samples: int, loading: Loading) -> Figures:
    """Samples per second of wall time, and per CPU second of all processes."""
    wall, cpu = end.wall - start.wall, end.process - start.process
    if not loading.threads:
        cpu += end.workers - start.workers
    return {
        "samples": samples,
        "wall_s": wall,
        "cpu_s": cpu,
        "samples_per_s": samples / wall,
        "samples_per_cpu_s": samples / cpu,
    }


def cpu_parts(start: Clocks, end: Clocks, loading: Loading) -> Figures:
    """CPU seconds by part; by `/proc`, which counts in ticks of 10 ms, all take `cpu_tree_s`.

    What workers spend beside the three parts is the transfer: of rows to them, and of batches from
    them. What this process spends beside its threads and the three parts is `main`.
    """
    spent = Clocks(*(after - before for before, after in zip(start, end, strict=True)))
    parts = spent.lookup + spent.tokenize + spent.collate
    main = spent.process - spent.sampler
    if loading.threads:
        main -= spent.workers
    elif not loading.workers:
        main -= parts
    return {
        "cpu_lookup_s": spent.lookup,
        "cpu_tokenize_s": spent.tokenize,
        "cpu_collate_s": spent.collate,
        "cpu_transfer_s": spent.workers - parts if loading.workers else 0.0,
        "cpu_main_s": main,
        "cpu_sampler_s": spent.sampler,
        "cpu_tree_s": spent.tree,
    }


def wait_percentiles(waits: Sequence[float]) -> Figures:
    """Milliseconds that the consumer waits for a batch: p50, p99 and p99.9."""
    percentiles = {"p50": 50.0, "p99": 99.0, "p999": 99.9}
    return {
        f"wait_{name}_ms": 1000 * float(np.percentile(waits, percentile))
        for name, percentile in percentiles.items()
    }
