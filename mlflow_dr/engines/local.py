"""The engine that encodes in this process, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mlflow_dr.devices import resolve_dtype, torch_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import Batches, Result, Work
from mlflow_dr.stores.token_table import TokenTable


class LocalEngine:
    """Does the work in this process; see `Engine`.

    Args:
        device: where the encoder is.
        encoder: one that is there already, in its number format and in evaluation mode.
    """

    n_shards = 1

    def __init__(self, device: torch.device, encoder: Encoder | None = None) -> None:
        self.device = device
        self._encoder = encoder

    def resolve_dtype(self, dtype: str) -> str:
        """See `Engine.resolve_dtype`."""
        return resolve_dtype(dtype, self.device)

    def load(self, encoder: Encoder, dtype: str) -> None:
        """See `Engine.load`."""
        self._encoder = encoder.eval().to(self.device, torch_dtype(dtype))

    def map(
        self,
        work: Work[Result],
        table: TokenTable,
        shards: Sequence[Batches],
        progress: Callable[[int], object],
    ) -> Iterator[Result]:
        """See `Engine.map`; progress is shown batch by batch."""
        assert self._encoder is not None, "load an encoder first"
        for shard in shards:
            yield work(self._encoder, table, _counted(shard, progress))

    def close(self) -> None:
        """Forget the encoder."""
        self._encoder = None


def _counted(shard: Batches, progress: Callable[[int], object]) -> Iterator[np.ndarray]:
    for batch in shard:
        yield batch
        progress(len(batch))
