"""Whether encoders differ on the same queries: randomisation test, bootstrap, Holm's correction.

Smucker, Allan, Carterette: A comparison of statistical significance tests for information
retrieval evaluation, CIKM 2007, which recommends the randomisation test. Efron, Tibshirani: An
Introduction to the Bootstrap, 1993 (percentile interval). Holm: A simple sequentially rejective
multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 9999
FEW_RESAMPLES = 1999  # for an interval that is only shown
CONFIDENCE = 0.95
PER_BATCH = 1 << 20  # values of queries that are in memory at a time
ROUNDING = 1e-12  # of the largest sum there can be; sums that differ by less are equal


class Difference(NamedTuple):
    """What is known of the difference between two encoders, `second - first`.

    Attributes:
        mean: over the queries.
        low: lower end of its 95 % bootstrap interval.
        high: the upper end.
        p_value: of the paired randomisation test, two-sided.
        queries: how many.
    """

    mean: float
    low: float
    high: float
    p_value: float
    queries: int

    def widened(self, *errors: float) -> Difference:
        """The same difference, if values are estimates; the p-value is still of the queries only.

        Args:
            errors: half the widths of the 95 % intervals of the values. They add as independent
                ones do, which is cautious: two estimates from one sample err alike.
        """
        low = self.mean - math.hypot(self.mean - self.low, *errors)
        return self._replace(low=low, high=self.mean + math.hypot(self.high - self.mean, *errors))

    def __str__(self) -> str:
        return f"95 % interval {self.low:+.4f} to {self.high:+.4f}, p {self.p_value:.4f}"


def difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """The mean difference of paired values, its interval and its p-value.

    Args:
        first: values of each query, `(n_queries,) float64`.
        second: values of the same queries, in the same order.
        seed: of the randomisations and the bootstrap.

    Raises:
        ValueError: other numbers of queries, none, or a value that is not a finite number.
    """
    changes = _changes(first, second)
    low, high = bootstrap_interval(first, second, seed)
    p_value = randomisation_test(first, second, seed)
    return Difference(float(changes.mean()), low, high, p_value, len(changes))


def randomisation_test(
    first: np.ndarray, second: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """The two-sided p-value of the paired randomisation test of the mean difference.

    If the encoders were equal, the two values of any query could be exchanged, which changes the
    sign of its difference. The p-value is the share of such exchanges whose mean is at least as
    large as the observed one. All exchanges are tried if there are no more than `resamples` of
    them; the p-value is then exact. Otherwise `resamples` exchanges are drawn at random, and the
    observed one counts among them.

    Args:
        first: values of each query, `(n_queries,) float64`.
        second: values of the same queries, in the same order.
        seed: of what is drawn.
        resamples: how many are drawn.

    Raises:
        ValueError: see `difference`.
    """
    changes = _changes(first, second)
    changes = changes[changes != 0]  # the sign of 0 changes nothing
    observed = abs(changes.sum()) - ROUNDING * np.abs(changes).sum()
    count = len(changes)
    if count == 0:
        return 1.0
    if count < resamples.bit_length():
        every = np.arange(1 << count)[:, None] >> np.arange(count) & 1
        return float(np.mean(np.abs(_sums(every, changes)) >= observed))
    generator = np.random.default_rng(seed)
    extreme = 1
    for size in _batches(resamples, count):
        drawn = generator.integers(0, 256, (size, -(-count // 8)), dtype=np.uint8)
        flips = np.unpackbits(drawn, axis=1, count=count)
        extreme += int((np.abs(_sums(flips, changes)) >= observed).sum())
    return extreme / (resamples + 1)


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over queries.

    Args:
        values: of each query, `(n_queries,) float64`.
        seed: of what is drawn.

    Raises:
        ValueError: there are none, or one is not a finite number.
    """
    return bootstrap_interval(np.zeros_like(values), values, seed, resamples=FEW_RESAMPLES)


def bootstrap_interval(
    first: np.ndarray,
    second: np.ndarray,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The percentile interval of the mean difference, queries drawn with replacement.

    Args:
        first: values of each query, `(n_queries,) float64`.
        second: values of the same queries, in the same order.
        seed: of what is drawn.
        confidence: share of the resampled means that lies within.
        resamples: how many times.

    Returns:
        Both ends; of a single query its difference, twice.

    Raises:
        ValueError: see `difference`.
    """
    # imported here, because it takes half a second
    from scipy.stats import bootstrap

    changes = _changes(first, second)
    if len(changes) == 1:
        return float(changes[0]), float(changes[0])
    result = bootstrap(
        (changes,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, PER_BATCH // len(changes)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, corrected so that one false alarm among all is as rare (Holm)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def _changes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`second - first`, checked."""
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"values of shapes {first.shape} and {second.shape}: expected equal ones")
    changes = second.astype(np.float64) - first.astype(np.float64)
    if not np.isfinite(changes).all():
        raise ValueError(f"{int((~np.isfinite(changes)).sum())} values are not finite numbers")
    return changes


def _sums(flips: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Sums of the changes, signs flipped where flips, `(n, n_queries)`, is 1; `(n,) float64`."""
    return changes.sum() - 2 * (flips.astype(np.float64) @ changes)


def _batches(total: int, width: int) -> list[int]:
    """Sizes of batches of rows that hold no more than `PER_BATCH` values each."""
    size = max(1, PER_BATCH // width)
    whole, rest = divmod(total, size)
    return [size] * whole + [rest] * bool(rest)
