"""What a study has found so far, in the user's cache: values of checkpoints, and seconds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_dr.cache import cache_entry, sound_entry
from mlflow_dr.files import digest_of

KIND = "fidelity"
VALUES = "values.npy"
LAYOUT = 1


class Kept:
    """Entries of the cache, one for each checkpoint and strategy.

    Args:
        strategies: all that the values of each depend on, beside the checkpoint.
    """

    def __init__(self, strategies: Sequence[tuple[object, ...]]) -> None:
        self._strategies = strategies

    def values(self, checkpoint: str) -> list[np.ndarray | None]:
        """Values of each query by strategy, `(n_queries,) float64`; None where there are none.

        Args:
            checkpoint: names its weights.
        """
        return [_read(key) for key in self._keys(checkpoint)]

    def keep(self, checkpoint: str, values: Sequence[np.ndarray | None]) -> None:
        """Keep what is known of a checkpoint."""
        for key, of_strategy in zip(self._keys(checkpoint), values, strict=True):
            if of_strategy is not None:
                _keep(key, of_strategy)

    def seconds(self, where: str) -> list[float]:
        """What each strategy cost; empty unless these were timed together, on this machine.

        Args:
            where: names the checkpoint and the device.
        """
        found = _read(self._timed(where))
        return [] if found is None else found.tolist()

    def keep_seconds(self, where: str, seconds: Sequence[float]) -> None:
        """Keep what each strategy cost."""
        _keep(self._timed(where), np.array(seconds))

    def _keys(self, checkpoint: str) -> list[str]:
        return [digest_of(LAYOUT, "values", checkpoint, *one) for one in self._strategies]

    def _timed(self, where: str) -> str:
        return digest_of(LAYOUT, "seconds", platform.node(), where, *self._strategies)


def _read(key: str) -> np.ndarray | None:
    entry = sound_entry(KIND, key)
    return None if entry is None else np.load(entry / VALUES)


def _keep(key: str, values: np.ndarray) -> None:
    def write(partial: Path) -> None:
        partial.mkdir()
        np.save(partial / VALUES, values)

    cache_entry(KIND, key, write)
