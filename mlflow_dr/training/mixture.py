"""Several training sets mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mlflow_dr.training.batches import Group, TrainingSet


class Mixture(Dataset[Group]):
    """Several training sets as one; an epoch has as many examples as they have together, or more.

    Each set gives its share of an epoch. It goes on through its examples, in an order drawn anew
    for each pass, from where the epoch before ended; so a small set with a large weight is read
    several times an epoch, and each time with the next of its positives and negatives.

    Args:
        parts: what is mixed.
        weights: the share of each; relative to each other.
        seed: of the order.
        total: examples of an epoch; as many as the sets have together when None.
    """

    def __init__(
        self,
        parts: Sequence[TrainingSet],
        weights: Sequence[float],
        seed: int,
        total: int | None = None,
    ) -> None:
        self._parts = parts
        self._seed = seed
        self._counts = _shares(total or sum(map(len, parts)), weights)
        self._starts = np.cumsum([0, *self._counts])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def set_epoch(self, epoch: int) -> None:
        """Choose for this epoch from now on; `RetrieverTrainer` calls it before each."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Group:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = int(self._epoch) * self._counts[part] + index - int(self._starts[part])
        visit, place = divmod(place, len(self._parts[part]))
        return self._parts[part].group(int(self._order(part, visit)[place]), visit)

    def _order(self, part: int, visit: int) -> np.ndarray:
        if (part, visit) not in self._orders:
            for old in [key for key in self._orders if key[0] == part and key[1] < visit - 1]:
                del self._orders[old]
            generator = np.random.default_rng([self._seed, part, visit])
            self._orders[part, visit] = generator.permutation(len(self._parts[part]))
        return self._orders[part, visit]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in the proportion of the weights."""
    ends = np.round(np.cumsum(weights) / sum(weights) * total).astype(int)
    return np.diff([0, *ends.tolist()]).tolist()
