"""Which queries of two curves are drawn together in a resample.

A subset's queries are among the full corpus's, so both curves get the same draws of them. Another
collection has queries of its own, which are drawn by themselves. So are those of each collection of
a suite, because its mean is over collections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pairing(NamedTuple):
    """The columns of the draws that are of each query.

    Attributes:
        sizes: how many queries each group has; as many are drawn from it.
        full: the column of each query of the full corpus, `(n_full,) int64`.
        subset: the column of each query of the subset, `(n_own,) int64`.
    """

    sizes: Sequence[int]
    full: np.ndarray
    subset: np.ndarray


def paired(own: np.ndarray, sizes: Sequence[int]) -> Pairing:
    """A subset's queries are among the full corpus's.

    Args:
        own: which of the full corpus's queries the subset's are, `(n_own,) int64`.
        sizes: how many queries each collection has; the full corpus's are in this order.
    """
    groups: list[np.ndarray] = []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        chosen = own[(own >= end - size) & (own < end)]
        groups += [chosen, np.setdiff1d(np.arange(end - size, end), chosen)]
    columns = np.empty(sum(sizes), np.int64)
    columns[np.concatenate(groups)] = np.arange(sum(sizes))
    return Pairing([len(group) for group in groups], columns, columns[own])


def independent(full: Sequence[int], other: Sequence[int]) -> Pairing:
    """The other curve has queries of its own.

    Args:
        full: how many queries each collection has.
        other: the same of the other curve.
    """
    columns = np.arange(sum(full) + sum(other))
    return Pairing([*full, *other], columns[: sum(full)], columns[sum(full) :])
