"""Measures on a whole corpus, estimated from a random sample of its passages.

All relevant passages are encoded. The rank of each is 1, plus the encoded passages above it, plus
the others above it, whose number is unknown. That number is Poisson, and its mean comes from the
scores of the sample: above a threshold, excesses follow a generalised Pareto distribution, whose
scale is the query's own and whose shape is common to all queries. A measure is a sum over relevant
passages of a weight times a function of the rank, so its expectation is exact.

Sources: Krichene and Rendle, On Sampled Metrics for Item Recommendation, KDD 2020 (values on
samples are biased, and can be corrected). Li, Jin, Gao and Liu, On Sampling Top-K Recommendation
Evaluation, KDD 2020. Pickands, Statistical Inference Using Extreme Order Statistics, Annals of
Statistics 1975 (excesses are generalised Pareto). Hosking and Wallis, Parameter and Quantile
Estimation for the Generalized Pareto Distribution, Technometrics 1987 (probability-weighted
moments). Wolter, Introduction to Variance Estimation, 2007 (the jackknife that deletes groups).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import HIGHEST_RELEVANCE, Measure

FEWEST = 8  # passages in a tail, and the fewest of a sample
PER_CUTOFF = 3  # a tail reaches down to this multiple of the cut-off, on the scale of the corpus
GROUPS = 10  # of the jackknife
FEW_IN_SAMPLE = 200  # below, the tails of the sample are no tails of the corpus
SHAPES = (-1.0, 0.45)  # L-moments exist for all, and variances up to 0.5
NORMAL_95 = 1.96
ERROR_FACTOR = 0.2  # 95 % error of one query, from a sample of half of the corpus
CELLS = 1 << 22  # numbers that are in memory at a time
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
    The factor is that of the measure with the largest error, MRR@10, on four collections.

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

    The interval joins two errors: that of the fitted tails, by a jackknife that leaves out a tenth
    of the sample at a time, and that of the unseen passages around their expected number.

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
    return {
        measure: _estimate(sample, relevant, gains, measure, parts)
        for parts in [list(_parts(sample, relevant))]
        for measure in measures
    }


def _estimate(
    sample: Sample,
    relevant: RelevantPassages,
    gains: Sequence[Sequence[int]],
    measure: Measure,
    parts: Sequence[tuple[Sample, RelevantPassages]],
) -> Estimate:
    weights = measure_weights(measure, relevant, gains)
    values = rank_values(measure)
    size = tail_size(measure.cutoff, sample.size, sample.unseen)

    def expected(part: Sample, passages: RelevantPassages) -> tuple[np.ndarray, np.ndarray]:
        """Values of the queries, and their standard deviations."""
        means, spreads = _moments(passages.seen, expected_unseen(part, passages, size), values)
        by_query = [np.bincount(relevant.query, weights * x, len(gains)) for x in (means, spreads)]
        return by_query[0], by_query[1]

    per_query, spread = expected(sample, relevant)
    variance = np.square(spread).sum() / len(gains) ** 2
    if parts:
        variance += (GROUPS - 1) * np.var([expected(*part)[0].mean() for part in parts])
    error = NORMAL_95 * float(np.sqrt(variance))
    mean = float(per_query.mean())
    of_subset, _ = _moments(relevant.seen, np.zeros(len(relevant.seen)), values)
    bound = max(mean, float((weights * of_subset).sum()) / len(gains))
    high = bound if sample.is_thinned else min(bound, mean + error)
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


def expected_unseen(sample: Sample, relevant: RelevantPassages, size: int) -> np.ndarray:
    """How many unseen passages are expected above each relevant one, `(n,) float64`.

    The threshold of a query is the score below its `size` highest. The scale is their mean excess
    times one less the shape. Above the threshold, the share of the sample that is in the tail is
    multiplied by the tail's survival function; below it, passages of the sample are counted.

    Args:
        sample: the highest scores of the sample.
        relevant: the relevant passages.
        size: how many scores a tail has; fewer where the sample has fewer.
    """
    if not sample.unseen:
        return np.zeros(len(relevant.score))
    size = min(size, int(np.isfinite(sample.scores).sum(axis=1).min()) - 1)
    in_sample = relevant.in_sample
    threshold = sample.scores[:, size].astype(np.float64)
    excess = sample.scores[:, :size] - threshold[:, None]
    mean, shape = excess.mean(axis=1), tail_shape(excess)
    scale = (mean * (1 - shape))[relevant.query]
    above = np.maximum(relevant.score - threshold[relevant.query], 0)
    steps = np.divide(above, scale, out=np.where(above > 0, np.inf, 0.0), where=scale > 0)
    if abs(shape) < 1e-6:
        survival = np.exp(-steps)
    else:
        survival = np.maximum(1 + shape * np.minimum(steps, 1e9), 0) ** (-1 / shape)
    counted = np.where(in_sample > size, in_sample + 0.5, size * survival)
    return np.asarray(sample.unseen * counted / sample.size)


def tail_shape(excess: np.ndarray) -> float:
    """The shape of the generalised Pareto distribution, common to all queries.

    By L-moments it is 2 less their ratio, the first by the second. Each query is divided by its own
    scale, and the ratio is the mean over queries. For exponential tails that has no bias at any
    size, unlike moments and likelihood. Other shapes come out closer to 0, by a sixth with eight
    scores. That is kept: queries differ in shape, and the heavier tails decide further out.

    Args:
        excess: scores less their threshold, descending, `(n_queries, size) float64`.
    """
    size = excess.shape[1]
    mean = excess.mean(axis=1)
    weight = np.arange(size)[::-1] / (size - 1)
    second = 2 * (excess * weight).mean(axis=1) - mean
    has_tail = mean > 0  # of queries whose scores are all equal nothing can be learnt
    if not has_tail.any():
        return 0.0
    ratio = float((second[has_tail] / mean[has_tail]).mean())
    return float(np.clip(2 - 1 / max(ratio, 1e-6), *SHAPES))


def _moments(
    seen: np.ndarray, unseen: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a function of the rank, for each relevant passage.

    Args:
        seen: encoded passages above it, `(n,) int64`.
        unseen: the expected number of others above it, `(n,) float64`.
        values: of the ranks 1, 2 and so on; 0 for all others, `(cutoff,) float64`.
    """
    cutoff = len(values)
    counts = np.arange(cutoff)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, cutoff)))])  # its logarithm
    padded = np.concatenate([values, [0.0]])
    mean, square = np.zeros(len(seen)), np.zeros(len(seen))
    for pairs in np.array_split(np.flatnonzero(seen < cutoff), 1 + len(seen) * cutoff // CELLS):
        expected = np.maximum(unseen[pairs], 1e-300)[:, None]
        probability = np.exp(counts * np.log(expected) - expected - factorial)
        of_rank = padded[np.minimum(seen[pairs, None] + counts, cutoff)]
        mean[pairs] = (probability * of_rank).sum(axis=1)
        square[pairs] = (probability * of_rank**2).sum(axis=1)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


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
