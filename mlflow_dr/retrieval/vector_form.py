"""The form in which passages' vectors are stored: fewer dimensions, fewer bits.

Matryoshka: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022. Numbers are quantised
as sentence-transformers' `quantize_embeddings` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mlflow_dr.errors import UsageError, quoted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
FLOAT32, INT8, BINARY = "float32", "int8", "binary"
PRECISIONS = (FLOAT32, INT8, BINARY)
MOST_DIGITS = 6
LEVELS = 255
SAMPLE = 4096
"""Passages whose vectors give the range of each dimension for int8."""


@dataclass(frozen=True)
class VectorForm:
    """A form of vectors; queries have its dimensions and stay float32.

    Attributes:
        dims: only so many of the first dimensions; all when None.
        precision: how a passage's number is stored: `float32`, `int8` or `binary` (its sign).
        normalize: whether vectors get length 1 again after dimensions are left out.
    """

    dims: int | None = None
    precision: str = FLOAT32
    normalize: bool = False

    def truncated(self, vectors: Tensor) -> Tensor:
        """The first dimensions, `(n, dims)`.

        Args:
            vectors: `(n, dim)`.
        """
        if self.dims is None:
            return vectors
        vectors = vectors[:, : self.dims]
        if not self.normalize:
            return vectors.contiguous()
        return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def stored(self, vectors: Tensor, ranges: np.ndarray | None = None) -> Tensor:
        """Passages' vectors as they are read back, `(n, dims) float32`.

        Args:
            vectors: `(n, dim) float32`.
            ranges: the smallest and the largest number of each dimension, `(2, dims) float32`;
                needed for int8.
        """
        vectors = self.truncated(vectors)
        if self.precision == BINARY:
            return (vectors > 0).to(vectors.dtype) * 2 - 1
        if self.precision == INT8 and ranges is not None:
            starts, ends = (vectors.new_tensor(row) for row in ranges)
            steps = (ends - starts) / LEVELS
            steps[steps == 0] = 1
            return starts + ((vectors - starts) / steps).floor().clamp(0, LEVELS) * steps
        return vectors

    @property
    def slug(self) -> str:
        """What is added to the name of a validation, such as `64d-int8`; empty for all of it."""
        precision = "" if self.precision == FLOAT32 else self.precision
        return "-".join(filter(None, (f"{self.dims}d" if self.dims else "", precision)))

    @property
    def config(self) -> dict[str, object]:
        """What differs from all dimensions in float32, by name."""
        precision = {} if self.precision == FLOAT32 else {"precision": self.precision}
        return {**({"dims": self.dims} if self.dims else {}), **precision}


ALL = VectorForm()


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """The smallest and the largest number of each dimension, `(2, dim)`."""
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def sampled_rows(rows: np.ndarray) -> np.ndarray:
    """The rows that give the ranges: all, or a random sample that depends only on these rows."""
    if len(rows) <= SAMPLE:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))


def parse_dims(texts: Sequence[str]) -> tuple[int, ...]:
    """Numbers of dimensions, such as `64,256`.

    Raises:
        UsageError: one of them is no whole number above 0, or stands twice.
    """
    words = _words(texts)
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS and int(word)):
            raise UsageError(f"dims {quoted(word)}: expected whole numbers above 0, such as 64,256")
    return _distinct(tuple(map(int, words)), "dims")


def parse_precisions(texts: Sequence[str]) -> tuple[str, ...]:
    """Precisions, such as `int8,binary`.

    Raises:
        UsageError: there is no such precision, or one stands twice.
    """
    words = _words(texts)
    for word in words:
        if word not in PRECISIONS:
            raise UsageError(f"precision {quoted(word)}: expected some of {', '.join(PRECISIONS)}")
    return _distinct(tuple(words), "precision")


def forms(dims: Sequence[int], precisions: Sequence[str]) -> list[VectorForm]:
    """All dimensions in float32 first, then every pair of a number and a precision."""
    each_precision = dict.fromkeys((FLOAT32, *precisions))
    return [
        VectorForm(number, precision) for number in (None, *dims) for precision in each_precision
    ]


def check_dims(dims: Sequence[int | None], dimension: int) -> None:
    """Refuse more dimensions than an encoder's vectors have.

    Raises:
        UsageError: with both numbers.
    """
    largest = max((number or 0 for number in dims), default=0)
    if largest > dimension:
        raise UsageError(
            f"dims {largest}: the encoder's vectors have {dimension} dimensions; choose fewer"
        )


def _words(texts: Sequence[str]) -> list[str]:
    return [word.strip() for text in texts for word in text.split(",")]


def _distinct(values: tuple[T, ...], name: str) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise UsageError(f"{name}: a value stands twice in {', '.join(map(str, values))}")
    return values
