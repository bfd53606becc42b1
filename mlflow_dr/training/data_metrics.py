"""Metrics of how examples reach the training: waiting, speed, padding, memory and disk reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlflow_dr.process_tree import Sampler, TreeSample
from mlflow_dr.training.batches import N_TOKENS, PASSAGE, QUERY, QUERY_IDS

PREFIX = "data/"
MEGABYTE = 1_000_000
WAITS_KEPT = 10_000


class Supply:
    """What the data loader gave since `take`, and how long training waited for it."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=WAITS_KEPT)
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()
        self._waits.clear()
        self._waited = 0.0
        self._samples = self._tokens = self._places = 0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader, whose times and sizes are counted."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            wait = time.perf_counter() - began
            self._waits.append(wait)
            self._waited += wait
            self._samples += len(batch.get(QUERY_IDS, ()))
            if tokens := batch.get(N_TOKENS):
                self._tokens += tokens
                self._places += sum(batch[role]["input_ids"].numel() for role in (QUERY, PASSAGE))
            yield batch

    def take(self, processes: int) -> dict[str, float]:
        """Metrics since the last call, without prefix; the counts begin anew.

        Args:
            processes: that train together; each has as many examples as this one.
        """
        seconds = time.perf_counter() - self._since
        metrics = {}
        if self._waits and seconds > 0:
            metrics = {
                "wait_fraction": self._waited / seconds,
                "wait_p99_ms": 1000 * float(np.quantile(self._waits, 0.99)),
                "samples_per_second": processes * self._samples / seconds,
            }
        if self._places:
            metrics["padding_fraction"] = 1 - self._tokens / self._places
        self.begin()
        return metrics


class DataMetrics:
    """The metrics `data/...` of the process that writes to MLflow.

    Args:
        supply: counts the batches of this process.
        sampler: measures this process and those below it, such as the loader's workers.
    """

    def __init__(self, supply: Supply, sampler: Sampler) -> None:
        self._supply = supply
        self._sampler = sampler
        self._used: TreeSample | None = None

    def begin(self) -> None:
        """Count from now on."""
        self._used = self._sampler.latest
        self._supply.begin()

    def take(self, processes: int) -> dict[str, float]:
        """Metrics since the last call, with their full names.

        Args:
            processes: that train together; each has as many examples as this one.
        """
        values = {**self._supply.take(processes), **self._from_sampler()}
        return {PREFIX + name: value for name, value in values.items()}

    def _from_sampler(self) -> dict[str, float]:
        latest, before = self._sampler.latest, self._used
        if latest is None:
            return {}
        self._used = latest
        values = {
            "memory_private_mb": latest.private / MEGABYTE,
            "memory_page_cache_mb": latest.file / MEGABYTE,
        }
        if before is not None and latest.time > before.time:
            read = max(0, latest.read_bytes - before.read_bytes)
            values["read_mb_per_second"] = read / MEGABYTE / (latest.time - before.time)
        return values
