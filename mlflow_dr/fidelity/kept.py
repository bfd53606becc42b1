"""What a study has found so far, in the user's cache: values of checkpoints, and seconds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_dr.files import cache_dir, digest_of, written_beside

LAYOUT = 1


class Kept:
    """Files of values, one for each checkpoint and strategy.

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
        return [_read(path) for path in self._files(checkpoint)]

    def keep(self, checkpoint: str, values: Sequence[np.ndarray | None]) -> None:
        """Keep what is known of a checkpoint."""
        for path, of_strategy in zip(self._files(checkpoint), values, strict=True):
            if of_strategy is not None:
                _write(path, of_strategy)

    def seconds(self, where: str) -> list[float]:
        """What each strategy cost; empty unless these were timed together, on this machine.

        Args:
            where: names the checkpoint and the device.
        """
        found = _read(self._timed(where))
        return [] if found is None else found.tolist()

    def keep_seconds(self, where: str, seconds: Sequence[float]) -> None:
        """Keep what each strategy cost."""
        _write(self._timed(where), np.array(seconds))

    def _files(self, checkpoint: str) -> list[Path]:
        return [_file("values", checkpoint, *strategy) for strategy in self._strategies]

    def _timed(self, where: str) -> Path:
        return _file("seconds", platform.node(), where, *self._strategies)


def _file(*parts: object) -> Path:
    return cache_dir() / "fidelity" / f"{digest_of(LAYOUT, *parts)}.npy"


def _read(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    values: np.ndarray = np.load(path)
    return values


def _write(path: Path, values: np.ndarray) -> None:
    with written_beside(path) as partial, partial.open("wb") as file:
        np.save(file, values)
