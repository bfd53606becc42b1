"""How a subset's curve agrees with the full corpus's: figures, and their bootstrap intervals.

Kendall's tau-b (Kendall: The treatment of ties in ranking problems, Biometrika 33, 1945) and
Pearson's correlation, as SciPy computes them. Efron, Tibshirani: An Introduction to the Bootstrap,
1993 (percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlflow_dr import pages
from mlflow_dr.fidelity_study.resampling import Pairing, independent, paired

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 1000
FIGURES = ("tau", "pearson", "regret", "inflation")
DIGITS = 12  # values that differ by less are equal, because sums are rounded
CELLS = 1 << 22  # numbers that are in memory at a time


class StudyFigure(NamedTuple):
    """A figure and the ends of its interval; NaN where they are not defined."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_defined(self) -> bool:
        """Whether there is such a figure."""
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether its interval is known."""
        return not math.isnan(self.low)


class Agreement(NamedTuple):
    """How far a subset can stand for the full corpus.

    Attributes:
        tau: Kendall's tau-b of the checkpoints' values; undefined where one curve is constant.
        pearson: Pearson's correlation of these values; undefined if one curve is constant.
        regret: how much higher the full corpus's value of its best checkpoint is than that of the
            checkpoint that the subset chooses; among equal values each chooses the earliest.
        inflation: how much higher the subset's values are, on average over the checkpoints.
    """

    tau: StudyFigure
    pearson: StudyFigure
    regret: StudyFigure
    inflation: StudyFigure


class Spread(NamedTuple):
    """How far the checkpoints lie apart on the full corpus.

    Attributes:
        observed: the best one's value less the worst one's.
        by_chance: if all checkpoints were equally good, chance alone would make a difference of at
            most this in 95 of 100 cases.
    """

    observed: float
    by_chance: float

    @property
    def is_flat(self) -> bool:
        """Whether the checkpoints are too close to be ordered."""
        return self.observed <= self.by_chance


def agreement(
    full: np.ndarray,
    subset: np.ndarray,
    own: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    pairing: Pairing | None = None,
) -> Agreement:
    """Compare a subset's values with those of the full corpus, checkpoint by checkpoint.

    A resample draws queries with replacement and computes every figure again from them. Each query
    brings its values of all checkpoints, on the subset and on the full corpus. If the subset has
    only some of the queries, as many are drawn from its queries as it has, and the rest from the
    other queries. The subset's means are over the former, and the full corpus's means are over
    both. If a figure is undefined in some resamples, its interval is that of the others.

    Args:
        full: values of each query, `(n_checkpoints, n_queries) float64`.
        subset: values on the subset, `(n_checkpoints, n_own) float64`.
        own: which of the queries the subset's are, `(n_own,) int64`; the same ones when None.
        resamples: how many; the intervals are undefined when 0, or when the subset has one query.
        seed: of what is drawn.
        pairing: which queries are drawn together, instead of `own`.
    """
    n_queries, n_own = full.shape[1], subset.shape[1]
    figures = _figures(means(subset), means(full))
    if resamples == 0 or n_own == 1:
        return Agreement(*map(StudyFigure, figures.tolist()))
    pairing = pairing or paired(np.arange(n_own) if own is None else own, (n_queries,))
    drawn = [
        _figures(
            _rounded(counts[:, pairing.subset] @ subset.T / n_own),
            _rounded(counts[:, pairing.full] @ full.T / n_queries),
        )
        for counts in _draws(pairing.sizes, resamples, seed, len(full))
    ]
    intervals = map(_interval, np.concatenate(drawn).T)
    return Agreement(
        *(
            StudyFigure(value, *ends)
            for value, ends in zip(figures.tolist(), intervals, strict=True)
        )
    )


def spread(
    full: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
) -> Spread:
    """How far the checkpoints lie apart, and how far they would if all were equal.

    Resampled means minus the observed means show what chance makes of equal checkpoints.

    Args:
        full: values of each query, `(n_checkpoints, n_queries) float64`.
        resamples: how many.
        seed: of what is drawn.
        sizes: how many queries each collection of a suite has.
    """
    observed = means(full)
    by_chance = [
        np.ptp(_rounded(counts @ full.T / full.shape[1]) - observed, axis=1)
        for counts in _draws(sizes or (full.shape[1],), resamples, seed, len(full))
    ]
    limit = np.quantile(np.concatenate(by_chance), CONFIDENCE) if by_chance else math.nan
    return Spread(float(np.ptp(observed)), float(limit))


def means(values: np.ndarray) -> np.ndarray:
    """Means over the queries, rounded so that means that differ only by rounding are equal.

    Args:
        values: `(n_checkpoints, n_queries) float64`.

    Returns:
        `(n_checkpoints,) float64`.
    """
    return _rounded(values.mean(axis=1))


def _figures(subset: np.ndarray, full: np.ndarray) -> np.ndarray:
    """The four figures of curves `(..., n_checkpoints)`: `(..., 4) float64`."""
    best = full.max(axis=-1)
    chosen = np.take_along_axis(full, subset.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    figures = (
        _kendall(subset, full),
        _pearson(subset, full),
        best - chosen,
        (subset - full).mean(axis=-1),
    )
    return _rounded(np.stack(figures, axis=-1))


def _kendall(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(first.shape[-1], 1)
    left = np.sign(first[..., i] - first[..., j])
    right = np.sign(second[..., i] - second[..., j])
    return _cosine(left, right)


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    left, right = (values - values.mean(axis=-1, keepdims=True) for values in (first, second))
    for centred, values in ((left, first), (right, second)):
        centred[np.ptp(values, axis=-1) == 0] = 0  # constant values, whose mean may be rounded
    return _cosine(left, right)


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """NaN where one of them is zero."""
    lengths = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        cosines: np.ndarray = ((left * right).sum(axis=-1) / lengths).clip(-1, 1)
    return cosines


def _draws(
    sizes: Sequence[int], resamples: int, seed: int, n_checkpoints: int
) -> Iterator[np.ndarray]:
    """How often each query is drawn: blocks `(n, sum(sizes)) float64`, each size by itself."""
    generator = np.random.default_rng(seed)
    pairs = n_checkpoints * (n_checkpoints - 1) // 2
    block = max(1, CELLS // max(sum(sizes), pairs, 1))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        yield np.hstack([_counts(generator, count, size) for size in sizes if size])


def _counts(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    drawn = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=count * size)
    return counts.reshape(count, size).astype(np.float64)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.round(DIGITS)


TOLERANCE = 0.005


@dataclass(frozen=True)
class SubsetCurve:
    """The values of every checkpoint on the full corpus, on a subset, or on another collection.

    Attributes:
        name: the subset or collection as it was asked for, or `full`.
        slug: its name in metrics and files.
        passages: how many it encodes.
        query_ids: of its queries.
        values: of each query, `(n_checkpoints, n_queries) float64`.
        seconds: of encoding, searching and measuring one checkpoint.
        intervals: if the values are estimates, both ends of the 95 % interval of each checkpoint's
            mean, `(n_checkpoints, 2) float64`; else None.
        sizes: how many of the queries are of each collection of a suite; empty if it is no suite.
        is_other: whether it has a corpus of its own, and is no subset.
        has_own_queries: whether its queries are not among those of the full corpus.
    """

    name: str
    slug: str
    passages: int
    query_ids: tuple[str, ...]
    values: np.ndarray
    seconds: float
    intervals: np.ndarray | None = None
    sizes: tuple[int, ...] = ()
    is_other: bool = False
    has_own_queries: bool = False

    @cached_property
    def weighted(self) -> np.ndarray:
        """The values, of a suite times weights by which each collection counts the same."""
        if not self.sizes:
            return self.values
        weights = [sum(self.sizes) / (len(self.sizes) * size) for size in self.sizes]
        return self.values * np.repeat(weights, self.sizes)

    @cached_property
    def means(self) -> np.ndarray:
        """Of each checkpoint, `(n_checkpoints,) float64`."""
        return means(self.weighted)

    @cached_property
    def best(self) -> int:
        """The index of its best checkpoint; among equal values the earliest."""
        return int(self.means.argmax())


@dataclass(frozen=True)
class StudiedSubset:
    """A subset compared with the full corpus.

    Attributes:
        curve: what it gave.
        agreement: with the full corpus.
        share: its seconds divided by the full corpus's.
        errors: its values less those of the full corpus, of each checkpoint.
        covered: of estimates, whether the full corpus's value is within the interval, of each
            checkpoint; else None.
    """

    curve: SubsetCurve
    agreement: Agreement
    share: float
    errors: np.ndarray
    covered: np.ndarray | None = None

    @property
    def is_estimate(self) -> bool:
        """Whether its values are estimates of the full corpus's."""
        return self.curve.intervals is not None

    @property
    def worst(self) -> int:
        """The index of the checkpoint whose value is farthest from the full corpus's."""
        return int(np.abs(self.errors).argmax())


@dataclass(frozen=True)
class FidelityResult:
    """What a study has found.

    Attributes:
        measure: the measure that orders the checkpoints.
        collection: what was searched.
        split: the split of the queries.
        steps: of the checkpoints, ascending; equal ones do not occur.
        full: what the full corpus gave.
        subsets: what they gave, as they were asked for.
        spread: how far the checkpoints lie apart.
        tolerance: the regret that is accepted.
        skipped: why a step's checkpoint could not be studied.
        collections: of a suite, what was found on each collection.
    """

    measure: str
    collection: str
    split: str
    steps: tuple[int, ...]
    full: SubsetCurve
    subsets: tuple[StudiedSubset, ...]
    spread: Spread
    tolerance: float = TOLERANCE
    skipped: Mapping[int, str] = field(default_factory=dict)
    collections: Mapping[str, FidelityResult] = field(default_factory=dict)

    @property
    def trusted(self) -> list[StudiedSubset]:
        """The subsets that may stand for the full corpus; none where its curve is flat.

        Their regret is within the tolerance, and the lower end of tau's interval is above 0, so
        their order agrees with the full corpus's by more than chance.
        """
        if self.spread.is_flat:
            return []
        return [
            subset
            for subset in self.subsets
            if subset.agreement.regret.value <= self.tolerance and subset.agreement.tau.low > 0
        ]

    @property
    def recommended(self) -> StudiedSubset | None:
        """The fastest subset that may be trusted, where it is faster than the full corpus."""
        faster = [subset for subset in self.trusted if subset.share < 1]
        return min(faster, key=lambda subset: subset.curve.seconds, default=None)

    def frame(self) -> pd.DataFrame:
        """A row for the full corpus and for each subset; empty cells where undefined."""
        import pandas as pd

        from mlflow_dr.fidelity_study.report import COLUMNS, finding_rows

        return pd.DataFrame(finding_rows(self), columns=COLUMNS).set_index("subset")

    def __repr__(self) -> str:
        from mlflow_dr.fidelity_study.report import report_text

        return report_text(self)

    def _repr_html_(self) -> str:
        from mlflow_dr.fidelity_study.report import curves_figure

        return f"{pages.code(repr(self))}\n{pages.picture(curves_figure(self))}"


def compare_curves(
    measure: str,
    collection: str,
    split: str,
    steps: Sequence[int],
    curves: Sequence[SubsetCurve],
    tolerance: float = TOLERANCE,
    skipped: Mapping[int, str] | None = None,
    resamples: int = RESAMPLES,
) -> FidelityResult:
    """Compare curves with the first of them, the full corpus's; see `FidelityResult`.

    Args:
        curves: the full corpus's, then those of subsets and of other collections.
        resamples: of the bootstrap.
    """
    full, *subsets = curves
    indices = {query_id: index for index, query_id in enumerate(full.query_ids)}

    def compared(curve: SubsetCurve) -> StudiedSubset:
        sizes = full.sizes or (len(full.query_ids),)
        if curve.has_own_queries:
            pairing = independent(sizes, curve.sizes or (len(curve.query_ids),))
        else:
            own = [indices[query_id] for query_id in curve.query_ids]
            pairing = paired(np.array(own, np.int64), sizes)
        figures = agreement(full.weighted, curve.weighted, None, resamples, pairing=pairing)
        covered = None
        if curve.intervals is not None:
            low, high = _rounded(curve.intervals.T)
            covered = (low <= full.means) & (full.means <= high)
        errors = curve.means - full.means
        return StudiedSubset(curve, figures, curve.seconds / full.seconds, errors, covered)

    return FidelityResult(
        measure,
        collection,
        split,
        tuple(steps),
        full,
        tuple(map(compared, subsets)),
        spread(full.weighted, resamples, sizes=full.sizes),
        tolerance,
        skipped or {},
    )
