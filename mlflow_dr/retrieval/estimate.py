"""Measures on a whole corpus, estimated from a random sample of its passages.

All relevant passages are encoded. The rank of each is 1, plus the encoded passages above it, plus
the others above it. Their number is unknown, but its distribution follows from the scores of the
sample and their tail. A measure is a sum over relevant passages of a weight times a function of the
rank, so its expectation is exact.

Sources: Krichene and Rendle, On Sampled Metrics for Item Recommendation, KDD 2020 (values on
samples are biased, and can be corrected). Li, Jin, Gao and Liu, On Sampling Top-K Recommendation
Evaluation, KDD 2020. Wolter, Introduction to Variance Estimation, 2007 (the jackknife that deletes
groups). The tails have sources of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import HIGHEST_RELEVANCE, Measure
from mlflow_dr.retrieval.tails import fit_tail

FEWEST = 8  # passages in a tail, and the fewest of a sample
PER_CUTOFF = 3  # a tail reaches down to this multiple of the cut-off, on the scale of the corpus
GROUPS = 10  # of the jackknife
FEW_IN_SAMPLE = 200  # below, the tails of the sample are no tails of the corpus
NORMAL_95 = 1.96
ERROR_FACTOR = 0.2  # 95 % error of one query, from a sample of half of the corpus
CELLS = 1 << 22  # numbers that are in memory at a time
LEAST_WEIGHT = 1e-3  # of a scale that counts
FAR = 30  # if so many times the cut-off are expected, the chance of fewer than that is below 1e-9
ESTIMABLE = ("mrr", "ndcg", "recall", "map", "precision", "success", "err", "rbp")


class Sample(NamedTuple):
    """What is left to chance: the passages of the corpus that no rule has chosen.

    Attributes:
        scores: the highest scores of the sample for each query, descending, `(n_queries, depth)`;
            minus infinity where there are fewer.
        rows: the passages that have them, `(n_queries, depth) int64`.
        size: how many passages the sample has.
        unseen: how many passages of the corpus are not encoded.
        is_thinned: whether other terms of the subset have chosen passages by their scores. They are
            then missing at the far end of the tail, and more of them than the fit knows.
    """

    scores: np.ndarray
    rows: np.ndarray
    size: int
    unseen: int
    is_thinned: bool = False


class RelevantPassages(NamedTuple):
    """The relevant passages of all queries, by query and then by descending score, `(n,)` each.

    Attributes:
        query: the position of the query.
        score: as those of the sample.
        seen: how many encoded passages rank above it.
        in_sample: how many passages of the sample are above it; `depth` stands for more, too.
        gain: its relevance.
    """

    query: np.ndarray
    score: np.ndarray
    seen: np.ndarray
    in_sample: np.ndarray
    gain: np.ndarray


class Unseen(NamedTuple):
    """How many passages that were not encoded are above each relevant one.

    The number is negative binomial: it is Poisson, and its mean is known from so many gaps between
    scores of the sample. Its expectation depends on the scale of the query's tail.

    Attributes:
        mean: the expected number for each scale, `(n, n_scales) float64`.
        weights: the probability of each scale, `(n, n_scales) float64`.
        gaps: the gaps, `(n,) float64`.
    """

    mean: np.ndarray
    weights: np.ndarray
    gaps: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """The expected number, `(n,) float64`."""
        return np.asarray((self.mean * self.weights).sum(axis=1))


class Interval(NamedTuple):
    """A mean over queries on the whole corpus, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """A measure on the whole corpus.

    Attributes:
        per_query: the expected value of each query, `(n_queries,) float64`.
        mean: over the queries. The interval is about the whole corpus's value of the same queries:
            it has the error of the sample, and not that of the queries.
    """

    per_query: np.ndarray
    mean: Interval


def check_estimable(measures: Sequence[Measure]) -> None:
    """Refuse measures that are no sum over relevant passages.

    Raises:
        UsageError: with those that can be estimated.
    """
    for measure in measures:
        if measure.name not in ESTIMABLE:
            raise UsageError(
                f"{measure} cannot be estimated from a sample, because it does not follow from the "
                f"ranks of relevant passages; these can: {', '.join(ESTIMABLE)}"
            )


def tail_size(cutoff: int, sample: int, unseen: int) -> int:
    """How many of a sample's highest scores a tail has: down to three times the cut-off.

    Args:
        cutoff: of the measure, in ranks of the corpus.
        sample: passages of the sample.
        unseen: passages that are not encoded.
    """
    deep = round(PER_CUTOFF * cutoff * sample / (sample + unseen)) if sample else 0
    return max(FEWEST, min(deep, sample // 4))


def share_for(target_error: float, n_queries: int) -> float:
    """The share of a corpus, above 0 and up to 1, for intervals of this size on either side.

    The error falls with the square roots of the number of queries and of the odds of being sampled.
    The factor is that of the measure with the largest error, MRR@10. On three collections and by
    two runs, intervals came out as 0.6 to 1.3 times the target; `docs/estimates.md` has the table.

    Args:
        target_error: half the width of the interval.
        n_queries: how many queries there are.
    """
    return 1 / (1 + n_queries * (target_error / ERROR_FACTOR) ** 2)


def check_sample(sample: int, unseen: int) -> None:
    """Refuse samples that show no tail.

    Raises:
        UsageError: with how many passages there are.
    """
    if unseen and sample <= FEWEST:
        raise UsageError(
            f"the sample has {sample} passages that are not judged and that no other term chose; "
            f"an estimate needs more than {FEWEST}, and should have {FEW_IN_SAMPLE}: give a larger "
            "random:P%"
        )


def estimate(
    sample: Sample,
    relevant: RelevantPassages,
    gains: Sequence[Sequence[int]],
    measures: Sequence[Measure],
) -> dict[Measure, Estimate]:
    """Estimate measures on the whole corpus.

    Unseen passages can only lower a value, so no interval ends above the value on the subset. If
    the sample is thinned, the estimate may be too low, and the interval ends there.

    The interval joins two errors: that of the sample, by a jackknife that leaves out a tenth of it
    at a time, and that of the number of unseen passages, given the sample.

    Args:
        sample: the highest scores of the sample; its depth is at least `tail_size` and one more.
        relevant: the relevant passages.
        gains: the relevance of all passages that are judged relevant, query by query, whether or
            not they are in the corpus.
        measures: what is estimated.

    Raises:
        UsageError: a measure cannot be estimated, or the sample is too small.
        ValueError: a score is NaN.
    """
    check_estimable(measures)
    check_sample(sample.size, sample.unseen)
    if np.isnan(sample.scores).any() or np.isnan(relevant.score).any():
        raise ValueError("a score is NaN")
    parts = [(sample, relevant), *_parts(sample, relevant)]
    sizes = {each: tail_size(each.cutoff, sample.size, sample.unseen) for each in measures}
    unseen = {size: [unseen_above(*part, size) for part in parts] for size in {*sizes.values()}}
    seen = [passages.seen for _, passages in parts]
    return {
        measure: _estimate(measure, seen, unseen[size], relevant, gains, sample.is_thinned)
        for measure, size in sizes.items()
    }


def _estimate(
    measure: Measure,
    seen: Sequence[np.ndarray],
    unseen: Sequence[Unseen],
    relevant: RelevantPassages,
    gains: Sequence[Sequence[int]],
    is_thinned: bool,
) -> Estimate:
    """The estimate from the passages above relevant ones: by the sample, then by its parts."""
    weights = measure_weights(measure, relevant, gains)
    values = rank_values(measure)

    def by_query(of_passages: np.ndarray) -> np.ndarray:
        return np.bincount(relevant.query, weights * of_passages, len(gains))

    means, spreads = _moments(seen[0], unseen[0], values)
    per_query, spread = by_query(means), by_query(spreads)
    variance = np.square(spread).sum() / len(gains) ** 2
    if len(seen) > 1:
        of_parts = [
            by_query(_moments(*part, values)[0]).mean()
            for part in zip(seen[1:], unseen[1:], strict=True)
        ]
        variance += (GROUPS - 1) * np.var(of_parts)
    error = NORMAL_95 * float(np.sqrt(variance))
    mean = float(per_query.mean())
    ranks = np.append(values, 0.0)
    of_subset = by_query(ranks[np.minimum(seen[0], measure.cutoff)])
    bound = max(mean, float(of_subset.mean()))
    high = bound if is_thinned else min(bound, mean + error)
    return Estimate(per_query, Interval(mean, max(0.0, mean - error), high))


def measure_weights(
    measure: Measure, relevant: RelevantPassages, gains: Sequence[Sequence[int]]
) -> np.ndarray:
    """What each relevant passage adds to a measure, times the value of its rank, `(n,) float64`.

    Args:
        measure: one of `ESTIMABLE`.
        relevant: the relevant passages.
        gains: as `estimate` takes them.
    """
    query, gain = relevant.query, relevant.gain
    counts = gain >= measure.parameter("rel")
    total = np.array(
        [sum(value >= measure.parameter("rel") for value in values) for values in gains], np.float64
    )
    order = _running(counts.astype(np.float64), query, np.add)  # 1 for the first that counts
    match measure.name:
        case "ndcg":
            ideal = [
                sum(value / np.log2(rank + 1) for rank, value in enumerate(best, start=1))
                for best in (sorted(values, reverse=True)[: measure.cutoff] for values in gains)
            ]
            weights = gain / np.maximum(np.array(ideal), 1e-12)[query]
        case "mrr" | "success":
            weights = counts & (order == 1)
        case "recall":
            weights = counts / np.maximum(total, 1)[query]
        case "map":
            weights = counts * order / np.maximum(total, 1)[query]
        case "precision":
            weights = counts / measure.cutoff
        case "rbp":
            weights = counts * (1 - measure.parameter("p"))
        case _:  # err: a reader goes on below a relevant passage with this probability
            stops = (2.0 ** np.minimum(gain, HIGHEST_RELEVANCE) - 1) / 2**HIGHEST_RELEVANCE
            goes_on = _running(1 - stops, query, np.multiply) / (1 - stops)
            weights = stops * goes_on
    return np.asarray(weights, np.float64)


def rank_values(measure: Measure) -> np.ndarray:
    """What a measure gives for ranks 1 to its cut-off, `(cutoff,) float64`."""
    ranks = np.arange(1, measure.cutoff + 1, dtype=np.float64)
    match measure.name:
        case "ndcg":
            return 1 / np.log2(ranks + 1)
        case "mrr" | "map" | "err":
            return 1 / ranks
        case "rbp":
            return np.asarray(measure.parameter("p") ** (ranks - 1))
    return np.ones_like(ranks)


def unseen_above(sample: Sample, relevant: RelevantPassages, size: int) -> Unseen:
    """How many passages that were not encoded are above each relevant one.

    If `n` passages of a sample are above a score, about `n + 1/2` of its `size + 1` gaps are, and
    each gap has as many unseen passages on average. Above the threshold of the tail, which is a
    score of the sample itself, all gaps are multiplied by the tail's survival function.

    Args:
        sample: the highest scores of the sample.
        relevant: the relevant passages.
        size: how many scores a tail has; fewer where the sample has fewer.
    """
    if not sample.unseen:
        nothing = np.zeros((len(relevant.score), 1))
        return Unseen(nothing, nothing + 1, nothing[:, 0] + 1)
    size = min(size, int(np.isfinite(sample.scores).sum(axis=1).min()) - 1)
    tail = fit_tail(sample.scores, size)
    is_counted = relevant.in_sample > size
    gaps = np.where(is_counted, relevant.in_sample + 0.5, size + 1.0)
    survival = tail.survival(relevant.query, relevant.score)
    share = gaps[:, None] * np.where(is_counted[:, None], 1, survival) / (sample.size + 1)
    return Unseen(sample.unseen * share, tail.weights[relevant.query], gaps)


def _moments(seen: np.ndarray, unseen: Unseen, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a function of the rank, for each relevant passage.

    Args:
        seen: encoded passages above it, `(n,) int64`.
        unseen: the others above it.
        values: of the ranks 1, 2 and so on; 0 for all others, `(cutoff,) float64`.
    """
    cutoff = len(values)
    moments = np.zeros((2, len(seen)))
    weights = np.where(unseen.weights > LEAST_WEIGHT, unseen.weights, 0)
    counts_at_all = (unseen.mean < FAR * cutoff) & (seen < cutoff)[:, None]
    passage, scale = np.nonzero((weights > 0) & counts_at_all)
    powers = np.stack([values, values**2])
    expect = _expect_constant if np.ptp(values) == 0 else _expect
    for part in np.array_split(np.arange(len(passage)), 1 + len(passage) * cutoff // CELLS):
        row = passage[part]
        mean = np.maximum(unseen.mean[row, scale[part]], 1e-300)
        expected = expect(seen[row], mean, unseen.gaps[row], powers)
        for moment, of_scale in zip(moments, expected, strict=True):
            moment += np.bincount(row, of_scale * weights[row, scale[part]], len(seen))
    mean, square = moments / weights.sum(axis=1)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _expect(
    seen: np.ndarray, mean: np.ndarray, gaps: np.ndarray, values: np.ndarray
) -> Iterator[np.ndarray]:
    """Expectations of functions of a rank; the number of unseen passages is negative binomial.

    Args:
        seen: encoded passages above, less than the cut-off, `(n,) int64`.
        mean: of the number of unseen ones, `(n,) float64`.
        gaps: see `Unseen`, `(n,) float64`.
        values: of the ranks 1, 2 and so on; 0 for all others, `(n_functions, cutoff) float64`.

    Yields:
        For each function, `(n,) float64`.
    """
    cutoff = values.shape[1]
    probability = count_probabilities(mean, gaps, cutoff)
    ranks = np.minimum(seen[:, None] + np.arange(cutoff), cutoff)
    for of_ranks in values:
        yield (probability * np.append(of_ranks, 0.0)[ranks]).sum(axis=1)


def count_probabilities(mean: np.ndarray, gaps: np.ndarray, cutoff: int) -> np.ndarray:
    """The negative binomial probability of 0, 1 and so on unseen passages, `(n, cutoff) float64`.

    Args:
        mean: of their number, above 0, `(n,) float64`.
        gaps: see `Unseen`, `(n,) float64`.
        cutoff: how many numbers.
    """
    counts = np.arange(cutoff)
    gaps, mean = gaps[:, None], mean[:, None]
    ratios = (gaps + counts[:-1]) / counts[1:] * (mean / (gaps + mean))
    none = -gaps * np.log1p(mean / gaps)
    return np.asarray(np.exp(np.hstack([none, none + np.log(ratios).cumsum(axis=1)])))


def _expect_constant(
    seen: np.ndarray, mean: np.ndarray, gaps: np.ndarray, values: np.ndarray
) -> Iterator[np.ndarray]:
    """`_expect` for a value that is the same up to the cut-off, as of recall: in one step."""
    from scipy.special import betainc

    within = betainc(gaps, values.shape[1] - seen, gaps / (gaps + mean))
    return (of_ranks[0] * within for of_ranks in values)


def _parts(sample: Sample, relevant: RelevantPassages) -> Iterator[tuple[Sample, RelevantPassages]]:
    """The sample without each group of its passages, and what of it is above relevant ones."""
    if not sample.unseen:
        return
    n_queries, depth = sample.rows.shape
    passages, numbers = np.unique(sample.rows, return_inverse=True)
    groups = np.random.default_rng(0).permutation(len(passages)) % GROUPS
    group = groups[numbers].reshape(sample.rows.shape)
    for left_out in range(GROUPS):
        kept = group != left_out
        above = np.concatenate([np.zeros((n_queries, 1), np.int64), kept.cumsum(axis=1)], axis=1)
        order = np.argsort(~kept, axis=1, kind="stable")
        scores = np.take_along_axis(np.where(kept, sample.scores, -np.inf), order, axis=1)
        size = round(sample.size * (1 - 1 / GROUPS))
        in_sample = above[relevant.query, np.minimum(relevant.in_sample, depth)]
        yield (
            sample._replace(scores=scores, size=size),
            relevant._replace(in_sample=in_sample),
        )


def _running(values: np.ndarray, query: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """The sum or product of the values of a query up to each of them."""
    result = values.copy()
    starts = np.flatnonzero(np.diff(query)) + 1
    for part in np.split(np.arange(len(values)), starts):
        result[part] = combine.accumulate(values[part])
    return result
