"""Estimates from strata by the first checkpoint, against those from a uniform sample.

    python -m benchmarks.strata --run-id RUN --dataset irds:vaswani --share 10

The stratum of a passage is its best rank for any query at the first checkpoint: up to 10, 100 or
1,000, or below. A stratum is drawn with half (--ratio) of the probability of the one above,
and as many passages are encoded as with a uniform sample of --share. The figures are those of
`benchmarks.estimates`. The ways to estimate:

- inverse probabilities (Horvitz and Thompson): a drawn passage above a relevant one stands for as
  many as its stratum has for each drawn one.
- a tail for each stratum: fitted as that of a uniform sample is; numbers of unseen passages add up.
- one weighted tail: of all drawn passages, with as many unseen ones for each as its stratum has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import digamma, polygamma

from benchmarks.estimates import (
    MEASURES,
    Half,
    Judged,
    Subset,
    all_scores,
    full_values,
    show_estimates,
    vectors,
    view,
)
from mlflow_dr.retrieval.estimate import (
    GROUPS,
    NORMAL_95,
    RelevantPassages,
    Sample,
    Unseen,
    _parts,
    count_probabilities,
    estimate,
    measure_weights,
    rank_values,
    tail_size,
    unseen_above,
)
from mlflow_dr.retrieval.tails import IMPOSSIBLE, LEAST_SPREAD, SCALES, SHAPES, Tail

LIMITS = (10, 100, 1000)
FEWEST_DRAWN = 200  # a stratum of which fewer are drawn is joined to the next

Strata = list[tuple[Sample, RelevantPassages]]


class Stratum(NamedTuple):
    """What `view` needs to know of the passages that are encoded; see `Subset`."""

    known: np.ndarray
    sample: np.ndarray
    unseen: int
    is_thinned: bool = False


def best_ranks(scores: np.ndarray) -> np.ndarray:
    """The best rank of each passage for any query, `(n_passages,) int64`."""
    best = np.full(scores.shape[1], LIMITS[-1] + 1)
    for of_query in scores:
        order = np.argsort(-of_query)[: LIMITS[-1]]
        best[order] = np.minimum(best[order], np.arange(1, len(order) + 1))
    return best


def allot(sizes: np.ndarray, total: int, ratio: float) -> np.ndarray:
    """How many passages are drawn from each stratum, `(n_strata,) int64`."""
    wanted = sizes * float(ratio) ** -np.arange(len(sizes))
    drawn = np.zeros(len(sizes))
    for _ in sizes:
        left = drawn < sizes
        share = (total - drawn[~left].sum()) / wanted[left].sum()
        drawn = np.where(left, np.minimum(sizes, wanted * share), drawn)
    return drawn.round().astype(np.int64)


def draw(best: np.ndarray, subset: Subset, ratio: float, seed: int) -> list[Stratum]:
    """Strata with as many passages in all as a subset's sample has; the first has the judged."""
    left = np.ones(len(best), bool)
    left[subset.known] = False
    number = np.searchsorted(LIMITS, best)
    strata = [np.flatnonzero(left & (number == index)) for index in range(len(LIMITS) + 1)]
    strata = [rows for rows in strata if len(rows)]
    while True:
        counts = allot(np.array(list(map(len, strata))), len(subset.sample), ratio)
        (small,) = np.nonzero(counts < FEWEST_DRAWN)
        if len(strata) == 1 or not len(small):
            break
        at = min(small[0], len(strata) - 2)
        strata[at : at + 2] = [np.concatenate(strata[at : at + 2])]
    random = np.random.default_rng(seed)
    known = [subset.known] + [np.empty(0, np.int64)] * (len(strata) - 1)
    return [
        Stratum(judged, random.permutation(rows)[:count], len(rows) - int(count))
        for judged, rows, count in zip(known, strata, counts, strict=True)
    ]


def chances(unseen: Unseen, cutoff: int) -> np.ndarray:
    """The probability of 0, 1 and so on unseen passages above relevant ones, `(n, cutoff)`."""
    total = np.zeros((len(unseen.gaps), cutoff))
    for mean, weight in zip(unseen.mean.T, unseen.weights.T, strict=True):
        probability = count_probabilities(np.maximum(mean, 1e-300), unseen.gaps, cutoff)
        total += weight[:, None] * probability
    return total


def by_inverse_probabilities(strata: Strata, cutoff: int) -> list[np.ndarray]:
    mean = sum(part.in_sample * sample.unseen / sample.size for sample, part in strata)
    return [np.maximum(0, 1 - np.abs(np.asarray(mean)[:, None] - np.arange(cutoff)))]


def by_tails(strata: Strata, cutoff: int) -> list[np.ndarray]:
    return [
        chances(unseen_above(*each, tail_size(cutoff, each[0].size, each[0].unseen)), cutoff)
        for each in strata
    ]


def by_weighted_tail(strata: Strata, cutoff: int) -> list[np.ndarray]:
    """One tail of the unseen passages; it has eight scores, or what weighs as much."""
    samples, parts = [sample for sample, _ in strata], [part for _, part in strata]
    per_gap = np.array([sample.unseen / (sample.size + 1) for sample in samples])
    size = tail_size(cutoff, samples[-1].size, samples[-1].unseen)
    scores = np.hstack([sample.scores for sample in samples]).astype(np.float64)
    stratum = np.repeat(np.arange(len(samples)), [sample.scores.shape[1] for sample in samples])
    order = np.argsort(-scores, axis=1)
    scores, stratum = np.take_along_axis(scores, order, 1), stratum[order]
    weights = np.where(np.isfinite(scores), per_gap[stratum], 0)
    effective = weights.cumsum(axis=1) ** 2 / (weights**2).cumsum(axis=1)
    finite = np.isfinite(scores).sum(axis=1)
    length = np.minimum((effective < size).sum(axis=1) + 1, finite - 1)
    queries, longest = np.arange(len(scores)), length.max()
    inside = np.arange(longest) < length[:, None]
    threshold = scores[queries, length]
    excess = np.where(inside, scores[:, :longest] - threshold[:, None], 0)
    tail = fit_weighted_tail(threshold, excess, np.where(inside, weights[:, :longest], 0))

    gaps = np.stack([((stratum[:, :longest] == s) & inside).sum(1) for s in range(len(samples))], 1)
    gaps = gaps + 0.5
    gaps[queries, stratum[queries, length]] += 0.5
    query, score = parts[0].query, parts[0].score
    counted = (score <= threshold[query])[:, None]
    gaps = np.where(counted, np.stack([part.in_sample for part in parts], 1) + 0.5, gaps[query])
    mean = (gaps * per_gap).sum(axis=1)
    unseen = Unseen(
        mean[:, None] * np.where(counted, 1, tail.survival(query, score)),
        tail.weights[query],
        mean**2 / (gaps * per_gap**2).sum(axis=1),
    )
    return [chances(unseen, cutoff)]


def fit_weighted_tail(threshold: np.ndarray, excess: np.ndarray, weights: np.ndarray) -> Tail:
    """`fit_tail` with a weight for each score; weights count as often as they vary little."""
    total = weights.sum(axis=1, keepdims=True)
    size = (total**2 / (weights**2).sum(axis=1, keepdims=True))[:, 0]
    weights = weights / total * size[:, None]
    log_mean = np.log(np.maximum((weights * excess).sum(axis=1) / size, 1e-12))

    def posterior(shape: float) -> tuple[np.ndarray, np.ndarray, float]:
        equal_size = size * (1 - 2 * shape)
        centre = (log_mean - digamma(equal_size) + np.log(equal_size)).mean()
        between = max(log_mean.var() - polygamma(1, equal_size).mean(), LEAST_SPREAD**2)
        precision = equal_size + 1 / between
        own_centre = (log_mean * equal_size + centre / between) / precision
        means = own_centre[:, None] + SCALES / np.sqrt(precision)[:, None]
        scales = np.exp(means) * (1 - shape)
        inside = 1 + shape * excess[:, :, None] / scales[:, None, :]
        logs = (weights[:, :, None] * np.log(np.maximum(inside, 1e-12))).sum(axis=1)
        likelihood = -size[:, None] * np.log(scales) - (1 / shape + 1) * logs
        likelihood = np.where(inside.min(axis=1) > 0, likelihood, IMPOSSIBLE)
        joint = likelihood - (means - centre) ** 2 / (2 * between)
        highest = joint.max(axis=1, keepdims=True)
        likely = np.exp(joint - highest)
        sums = likely.sum(axis=1, keepdims=True)
        constant = 0.5 * np.log(between * precision).sum()
        return scales, likely / sums, float((highest + np.log(sums)).sum() - constant)

    found = minimize_scalar(lambda shape: -posterior(shape)[2], bounds=SHAPES)
    return Tail(threshold, float(found.x), *posterior(float(found.x))[:2])


Way = Callable[[Strata, int], list[np.ndarray]]
WAYS: dict[str, Way] = {
    "inverse probabilities": by_inverse_probabilities,
    "a tail for each": by_tails,
    "one weighted tail": by_weighted_tail,
}


def spread_of_rank(
    seen: np.ndarray, parts: list[np.ndarray], values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a function of the rank; the numbers of the parts add up."""
    cutoff = len(values)
    total = parts[0]
    for part in parts[1:]:
        product = np.fft.rfft(total, 2 * cutoff) * np.fft.rfft(part, 2 * cutoff)
        total = np.maximum(np.fft.irfft(product)[:, :cutoff], 0)
    of_rank = np.append(values, 0.0)[np.minimum(seen[:, None] + np.arange(cutoff), cutoff)]
    mean = (total * of_rank).sum(axis=1)
    return mean, np.sqrt(np.maximum((total * of_rank**2).sum(axis=1) - mean**2, 0))


def intervals(strata: Strata, judged: Judged, way: Way) -> np.ndarray:
    """Value and ends of the interval of each measure, `(n_measures, 3)`; see `estimate`."""
    relevant, n_queries = strata[0][1], len(judged.rows)
    seen = np.sum([part.seen for _, part in strata], axis=0)
    strata = [each for each in strata if each[0].unseen]
    without = zip(*(_parts(*each) for each in strata), strict=True)
    samples = [strata, *map(list, without)]
    found = {
        cutoff: [way(sample, cutoff) for sample in samples]
        for cutoff in {measure.cutoff for measure in MEASURES}
    }
    rows = []
    for measure in MEASURES:
        weights, values = measure_weights(measure, relevant, judged.gains), rank_values(measure)
        pairs = [spread_of_rank(seen, parts, values) for parts in found[measure.cutoff]]
        value, *others = [(weights * mean).sum() / n_queries for mean, _ in pairs]
        spread = np.bincount(relevant.query, weights * pairs[0][1], n_queries)
        variance = np.square(spread).sum() / n_queries**2 + (GROUPS - 1) * np.var(others)
        error = NORMAL_95 * np.sqrt(variance)
        rows.append([value, value - error, value + error])
    return np.array(rows)


def study(arguments: argparse.Namespace) -> None:
    judged, files = vectors(arguments)
    first = next(all_scores(files))
    half = Half(judged, first.shape[1]) if arguments.half else None
    judged, first = (half.judged, half.scores(first)) if half else (judged, first)
    best, files = best_ranks(first), files[1:]
    shape = (len(files), arguments.seeds, len(MEASURES), 3)
    full = np.zeros((len(files), 1, len(MEASURES)))
    found = {name: np.zeros(shape) for name in ["uniform sample", *WAYS]}
    strata: list[Stratum] = []
    for index, scores in enumerate(all_scores(files)):
        scores = half.scores(scores) if half else scores
        full[index, 0] = full_values(scores, judged)
        for seed in range(arguments.seeds):
            subset = Subset(judged, len(best), arguments.share / 100, seed, np.empty(0, np.int64))
            results = estimate(*view(scores, judged, subset), judged.gains, MEASURES)
            found["uniform sample"][index, seed] = [results[each].mean for each in MEASURES]
            strata = draw(best, subset, arguments.ratio, seed)
            parts = [view(scores, judged, stratum) for stratum in strata]
            for name, way in WAYS.items():
                found[name][index, seed] = intervals(parts, judged, way)
    print(
        f"{arguments.dataset}: {len(files)} checkpoints, {len(judged.rows)} queries, "
        f"{len(best)} passages, {len(subset.known)} judged, {len(subset.sample)} drawn; of the "
        "strata",
        ", ".join(f"{len(each.sample)} of {len(each.sample) + each.unseen}" for each in strata),
    )
    for name, each in found.items():
        show_estimates(name, *np.moveaxis(each, -1, 0), full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--skip", type=int, default=0, help="other queries: those after so many")
    parser.add_argument("--share", type=float, default=10.0, help="of the corpus, in percent")
    parser.add_argument("--half", action="store_true", help="of the queries and of the passages")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--vectors", type=Path, default=Path("vectors"))
    parser.add_argument("--ratio", type=float, default=2, help="of a stratum's probability")
    study(parser.parse_args())


if __name__ == "__main__":
    main()
