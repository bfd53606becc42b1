"""What an engine is: it has an encoder on one or more devices, and runs work on shards there.

A shard is a part of the batches of one plan (`plan_batches`), so a batch has the same rows, and its
vectors have the same bits wherever it is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.stores.token_table import TokenTable

SHARDS_PER_WORKER = 8
"""More shards leave workers idle for less time at the end, and cost more to merge."""

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
Batches = Sequence[np.ndarray]
"""Rows of a token table in batches, each `(n_in_batch,) int64`."""


class Work(Protocol[Result_co]):
    """What is done with each shard; it can be pickled, and so can its result."""

    def __call__(
        self, encoder: Encoder, table: TokenTable, batches: Iterable[np.ndarray]
    ) -> Result_co:
        """Do it.

        Args:
            encoder: on its device and in its number format.
            table: has the tokens of the shard's rows.
            batches: the shard, `(n_in_batch,) int64` each.
        """
        ...


class Engine(Protocol):
    """Runs work on shards, on one or more devices.

    Attributes:
        device: the device of each worker; of several on one machine, the first.
    """

    device: torch.device

    @property
    def n_shards(self) -> int:
        """Into how many shards a plan should be split."""
        ...

    def resolve_dtype(self, dtype: str) -> str:
        """The number format of a name on the engine's devices; see `devices.resolve_dtype`."""
        ...

    def load(self, encoder: Encoder, dtype: str) -> None:
        """Bring an encoder to all workers, instead of the one before.

        Args:
            encoder: its weights may be moved and changed to the number format.
            dtype: `fp32`, `bf16` or `fp16`.
        """
        ...

    def map(
        self,
        work: Work[Result],
        table: TokenTable,
        shards: Sequence[Batches],
        progress: Callable[[int], object],
    ) -> Iterator[Result]:
        """Do the work on each shard; results come in any order.

        Args:
            work: is sent to each worker once.
            table: the tokens of all shards.
            shards: what is done at a time by one worker.
            progress: called with the number of rows that are done.

        Raises:
            CheckpointError: the encoder gives NaN, for example; whatever the work raises.
            UnavailableError: workers end again and again.
        """
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def split_shards(batches: Batches, n: int) -> list[Batches]:
    """The batches in up to n shards of about equal work, none of them empty."""
    return [batches[index::n] for index in range(min(n, len(batches)))]
