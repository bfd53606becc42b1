"""What a loader study has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mlflow_dr.loaders.cell import Cell


@dataclass(frozen=True)
class CellFigures:
    """One cell's figures.

    Attributes:
        cell: the cell.
        repeats: the figures of each repeat, by their names; see `mlflow_dr.loaders.cell`.
        problem: why the cell was not measured; empty if it was.
    """

    cell: Cell
    repeats: Sequence[Mapping[str, Any]]
    problem: str = ""

    def __getitem__(self, name: str) -> float:
        """The median of a figure over the repeats; NaN if none has it."""
        values = self.values(name)
        return median(values) if values else float("nan")

    @property
    def names(self) -> list[str]:
        """Names of the figures that are single numbers."""
        figures = {name: value for repeat in self.repeats for name, value in repeat.items()}
        return [name for name, value in figures.items() if isinstance(value, int | float)]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The figures of each repeat as metrics, such as `loaders/samples_per_s`."""
        return [
            {f"loaders/{name}": float(repeat[name]) for name in self.names if name in repeat}
            for repeat in self.repeats
        ]

    def values(self, name: str) -> list[float]:
        """A figure in each repeat that has it."""
        return [float(repeat[name]) for repeat in self.repeats if repeat.get(name) is not None]


@dataclass(frozen=True)
class LoaderStudy:
    """What a study has found.

    Attributes:
        dataset: the dataset's name.
        passages: how many there are.
        payload: what reached the training process.
        model: the encoder that was trained, or `none`.
        cells: what was measured, in the order of the configuration.
        build_seconds: store -> how long its files took to build; only those built now.
    """

    dataset: str
    passages: int
    payload: str
    model: str
    cells: Sequence[CellFigures]
    build_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> list[CellFigures]:
        """The cells that have figures."""
        return [cell for cell in self.cells if cell.repeats]
