"""Estimates of the full corpus's values from samples, against these values.

    python -m benchmarks.estimates --run-id RUN --dataset irds:vaswani --share 10

Every checkpoint of a run encodes the queries and the corpus once (kept in --vectors). Then samples
are drawn with five seeds, and each way to estimate is compared with the full corpus: the mean error
over checkpoints and seeds (bias), the worst checkpoint, how often the full corpus's value is within
the 95 % interval, Kendall's tau and the regret. "Corrected" is what `mlflow-dr best` makes of it if
the middle checkpoint, or three of them, were validated in full. "Off" is their difference as it is,
taken off all others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import kendalltau

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.decisions.correction import shared_error
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.retrieval import estimate as estimating
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.estimate import (
    Estimate,
    RelevantPassages,
    Sample,
    estimate,
    share_for,
)
from mlflow_dr.retrieval.measures import Measure, parse_measures
from mlflow_dr.retrieval.tails import SHAPES, Tail, fit_tail
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import resolve_run
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.encoders import load_checkpoint
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.validations import EvalConfig

MEASURES = parse_measures("mrr@10 ndcg@10 recall@100")
DEPTH = 340  # three times the cut-off of recall@100, and some that the jackknife leaves out
OURS = "several scales, 8"
FitTail = Callable[[np.ndarray, int], Tail]


class Judged(NamedTuple):
    """Rows and gains of the relevant passages of each query."""

    rows: list[list[int]]
    gains: list[list[int]]


def by_l_moments(excess: np.ndarray) -> float:
    """2 less the ratio of the first L-moment by the second; each query by its own scale."""
    size = excess.shape[1]
    mean = excess.mean(axis=1)
    second = 2 * (excess * np.arange(size)[::-1] / (size - 1)).mean(axis=1) - mean
    ratio = float((second[mean > 0] / mean[mean > 0]).mean())
    return float(np.clip(2 - 1 / ratio, *SHAPES))


def by_moments(excess: np.ndarray) -> float:
    ratios = excess / np.maximum(excess.mean(axis=1, keepdims=True), 1e-12)
    return float(np.clip(0.5 * (1 - 1 / ((ratios - 1) ** 2).mean()), *SHAPES))


def by_likelihood(excess: np.ndarray) -> float:
    """The best of a grid, the scale of each query at its own best."""
    best = (-np.inf, 0.0)
    for shape in np.arange(-0.8, 0.45, 0.05) + 0.001:
        scale = excess.mean(axis=1, keepdims=True) * (1 - shape)
        for _ in range(15):
            scale = np.maximum(
                (1 + shape) * (excess / (1 + shape * excess / scale)).mean(axis=1, keepdims=True),
                -1.001 * min(shape, 0) * excess[:, :1] + 1e-12,
            )
        logarithms = np.log(np.maximum(1 + shape * excess / scale, 1e-12))
        value = -float((np.log(scale) + (1 + 1 / shape) * logarithms).sum())
        best = max(best, (value, float(shape)))
    return best[1]


def exponential(excess: np.ndarray) -> float:
    return 0.0


def one_scale(shape_of: Callable[[np.ndarray], float]) -> FitTail:
    """A way to fit tails in which the scale of each query is its mean excess times 1 - shape."""

    def fit(scores: np.ndarray, size: int) -> Tail:
        threshold = scores[:, size].astype(np.float64)
        excess = scores[:, :size] - threshold[:, None]
        shape = shape_of(excess)
        scales = excess.mean(axis=1, keepdims=True) * (1 - shape)
        return Tail(threshold, shape, scales, np.ones_like(scales))

    return fit


WAYS: dict[str, tuple[FitTail, int]] = {
    OURS: (fit_tail, 8),
    "several scales, 6": (fit_tail, 6),
    "several scales, 16": (fit_tail, 16),
    "several scales, 32": (fit_tail, 32),
    "L-moments, 8": (one_scale(by_l_moments), 8),
    "moments, 16": (one_scale(by_moments), 16),
    "likelihood, 16": (one_scale(by_likelihood), 16),
    "exponential, 16": (one_scale(exponential), 16),
}


class Subset:
    """Which passages are encoded: judged ones, tops of another encoder, and a random sample."""

    def __init__(self, judged: Judged, n: int, share: float, seed: int, tops: np.ndarray) -> None:
        known = np.zeros(n, bool)
        known[[row for rows in judged.rows for row in rows]] = True
        known[tops] = True
        self.is_thinned = len(tops) > 0
        drawn = np.zeros(n, bool)
        drawn[np.random.default_rng(seed).permutation(n)[: round(share * n)]] = True
        self.known, self.sample = np.flatnonzero(known), np.flatnonzero(drawn & ~known)
        self.unseen = n - len(self.known) - len(self.sample)


def flat(judged: Judged, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, row and gain of all relevant passages, by query and descending score."""
    query = np.repeat(np.arange(len(judged.rows)), [len(rows) for rows in judged.rows])
    rows = np.array([row for rows in judged.rows for row in rows])
    gains = np.array([gain for gains in judged.gains for gain in gains])
    order = np.lexsort((-scores[query, rows], query))
    return query[order], rows[order], gains[order]


def count_above(scores: np.ndarray, query: np.ndarray, levels: np.ndarray) -> np.ndarray:
    parts = [
        (scores[query[some]] > levels[some, None]).sum(axis=1)
        for some in np.array_split(np.arange(len(query)), 1 + len(query) // 256)
    ]
    return np.concatenate(parts)


def view(scores: np.ndarray, judged: Judged, subset: Subset) -> tuple[Sample, RelevantPassages]:
    query, rows, gain = flat(judged, scores)
    level = scores[query, rows]
    part = scores[:, subset.sample]
    depth = min(DEPTH, part.shape[1])
    best = np.argsort(-part, axis=1)[:, :depth]
    above = count_above(part, query, level)
    seen = above + count_above(scores[:, subset.known], query, level)
    sample = Sample(
        np.take_along_axis(part, best, 1),
        subset.sample[best],
        part.shape[1],
        subset.unseen,
        subset.is_thinned,
    )
    above = np.minimum(above, depth)
    return sample, RelevantPassages(query, level.astype(np.float64), seen, above, gain)


def full_values(scores: np.ndarray, judged: Judged) -> np.ndarray:
    """The values of the full corpus, `(n_measures,)`: an estimate without anything unseen."""
    query, rows, gain = flat(judged, scores)
    level = scores[query, rows].astype(np.float64)
    seen = count_above(scores, query, level)
    empty = Sample(np.zeros((1, 1)), np.zeros((1, 1), np.int64), 0, 0)
    exact = RelevantPassages(query, level, seen, np.zeros_like(seen), gain)
    return values_of(estimate(empty, exact, judged.gains, MEASURES))


def values_of(results: dict[Measure, Estimate]) -> np.ndarray:
    return np.array([results[measure].mean.value for measure in MEASURES])


def by_way(
    name: str, sample: Sample, relevant: RelevantPassages, judged: Judged
) -> dict[Measure, Estimate]:
    kept = estimating.fit_tail, estimating.FEWEST
    estimating.fit_tail, estimating.FEWEST = WAYS[name]  # type: ignore[assignment]
    try:
        return estimate(sample, relevant, judged.gains, MEASURES)
    finally:
        estimating.fit_tail, estimating.FEWEST = kept  # type: ignore[assignment]


def chosen_queries(topics: Topics, arguments: argparse.Namespace) -> list[Query]:
    order = np.random.default_rng(7).permutation(len(topics.queries))
    chosen = order[arguments.skip : arguments.skip + arguments.queries]
    return [topics.queries[index] for index in sorted(chosen)]


def vectors(arguments: argparse.Namespace) -> tuple[Judged, list[Path]]:
    """The judgements, and a file of vectors for each checkpoint, by step."""
    run = resolve_run(connect(None), arguments.run_id)
    collection = open_collection(arguments.dataset)
    corpus, topics = collection.corpus(), collection.topics(arguments.split)
    queries = chosen_queries(topics, arguments)
    pairs = [
        [
            (row, gain)
            for row, gain in zip(
                corpus.rows_of(list(topics.qrels[query.id])).tolist(),
                topics.qrels[query.id].values(),
                strict=True,
            )
            if gain > 0 and row >= 0
        ]
        for query in queries
    ]
    judged = Judged(
        [[r for r, _ in some] for some in pairs], [[g for _, g in some] for some in pairs]
    )
    arguments.vectors.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for checkpoint in sorted(run_checkpoints(run), key=lambda each: each.step):
        if not checkpoint.ready or not checkpoint.step:
            continue
        of = f"{Path(collection.name).name}-{arguments.skip}-{len(queries)}"
        name = f"{run.id[:8]}-{of}-{checkpoint.step:08}.npz"
        files.append(arguments.vectors / name)
        if not files[-1].exists():
            encoder = load_checkpoint(checkpoint, {}).eval()
            tokenizer = TextTokenizer.of(encoder)
            table = token_table(tokenizer.query_ids(queries))
            of_queries = encode_all(encoder.query_encoder, table, tokenizer.pad_id, "query")
            tokens = corpus_tokens(corpus, tokenizer)
            of_passages = encode_all(encoder, tokens, tokenizer.pad_id, "passage")
            np.savez(files[-1], queries=of_queries.numpy(), passages=of_passages.numpy())
    return judged, files


def all_scores(files: list[Path]) -> Iterator[np.ndarray]:
    for path in files:
        with np.load(path) as arrays:
            yield arrays["queries"] @ arrays["passages"].T


class Half:
    """A smaller collection: the second half of the queries, and every second passage."""

    def __init__(self, judged: Judged, n: int) -> None:
        self.start = len(judged.rows) // 2
        rows, gains = judged.rows[self.start :], judged.gains[self.start :]
        kept = np.arange(n) % 2 == 1
        kept[[row for some in rows for row in some]] = True
        number = np.cumsum(kept) - 1
        self.passages = np.flatnonzero(kept)
        self.judged = Judged([number[some].tolist() for some in rows], gains)

    def scores(self, scores: np.ndarray) -> np.ndarray:
        return scores[self.start :][:, self.passages]


def study(arguments: argparse.Namespace, judged: Judged, files: list[Path]) -> None:
    half = Half(judged, next(all_scores(files)).shape[1]) if arguments.half else None
    judged = half.judged if half else judged
    tops = np.empty(0, np.int64)
    if arguments.tops:
        first = next(all_scores(files))
        first = half.scores(first) if half else first
        tops = np.unique(np.argsort(-first, axis=1)[:, : arguments.tops])
        files = files[1:]
    ways = list(WAYS) if arguments.all_ways else [OURS]
    seeds = range(arguments.seeds)
    share = arguments.share / 100
    if arguments.target_error:
        share = share_for(arguments.target_error, len(judged.rows))
        print(f"--target-error {arguments.target_error:g}: random:{share:.2%}")
    shape = (len(files), len(seeds), len(MEASURES))
    full = np.zeros((len(files), 1, len(MEASURES)))
    naive = np.zeros(shape)
    found = {name: (np.zeros(shape), np.zeros(shape), np.zeros(shape)) for name in ways}
    encoded = 0
    for index, scores in enumerate(all_scores(files)):
        scores = half.scores(scores) if half else scores
        full[index, 0] = full_values(scores, judged)
        for seed in seeds:
            subset = Subset(judged, scores.shape[1], share, seed, tops)
            encoded = len(subset.known) + len(subset.sample)
            sample, relevant = view(scores, judged, subset)
            naive[index, seed] = values_of(
                estimate(sample._replace(unseen=0), relevant, judged.gains, MEASURES)
            )
            for name in ways:
                results = by_way(name, sample, relevant, judged)
                intervals = np.array([results[measure].mean for measure in MEASURES])
                for kept, column in zip(found[name], intervals.T, strict=True):
                    kept[index, seed] = column
    n_passages = scores.shape[1]
    print(
        f"{arguments.dataset}: {len(files)} checkpoints, {len(judged.rows)} queries, {encoded} of "
        f"{n_passages} passages encoded ({encoded / n_passages:.1%}), of which {len(subset.sample)}"
        f" are the sample; {arguments.seeds} seeds; {machine()}"
    )
    print("full corpus", *(f"{name} {a:.3f} to {b:.3f};" for name, a, b in spans(full)))
    show("the subset itself", naive, full)
    for name in ways[1:]:
        show(name, found[name][0], full)
    show_estimates(OURS, *found[OURS], full)


def time_validations(arguments: argparse.Namespace) -> None:
    """CPU seconds of a validation by the last checkpoint, whose tokens are there already."""
    run = resolve_run(connect(None), arguments.run_id)
    checkpoint = max(run_checkpoints(run), key=lambda each: each.step)
    encoder = load_checkpoint(checkpoint, {}).eval()
    settings = EvalConfig(MEASURES, device="cpu", dtype="fp32")
    full = EvalDataset(open_collection(arguments.dataset), arguments.split)
    full.topics = full.topics.of(chosen_queries(full.topics, arguments))
    spec = parse_subset(f"random:{arguments.share:g}%")
    estimating_settings = settings.estimating(spec)
    requests = [(full, settings), (full.on_subset(spec, settings), estimating_settings)]
    times: list[list[float]] = [[], []]
    for _ in range(4):
        for (data, asked), taken in zip(requests, times, strict=True):
            start = time.process_time()
            evaluate(encoder, data, asked, quiet=True)
            taken.append(time.process_time() - start)
    seconds = [min(taken[1:]) for taken in times]
    for (data, _), taken in zip(requests, seconds, strict=True):
        print(f"{data.n_passages} passages, {len(data.topics.queries)} queries: {taken:.2f} s")
    print(f"{seconds[1] / seconds[0]:.1%} of a full validation; {machine()}")


def spans(full: np.ndarray) -> list[tuple[str, float, float]]:
    values = full[:, 0]
    return list(zip(MEASURES, values.min(axis=0), values.max(axis=0), strict=True))


def show(name: str, values: np.ndarray, full: np.ndarray) -> None:
    """Bias, worst checkpoint, root mean square error, tau and regret."""
    errors = values - full
    taus, regrets = [], []
    for of_seed in np.moveaxis(values, 1, 0):
        for column in range(len(MEASURES)):
            truth = full[:, 0, column]
            taus.append(kendalltau(of_seed[:, column], truth).statistic)
            regrets.append(truth.max() - truth[of_seed[:, column].argmax()])
    print(f"{name:22} {errors_row(errors)}  tau {np.mean(taus):.3f}  regret {np.mean(regrets):.4f}")


def show_estimates(
    name: str, values: np.ndarray, low: np.ndarray, high: np.ndarray, full: np.ndarray
) -> None:
    """Errors of estimates, as they are and corrected, and of their intervals."""
    show(name, values, full)
    show_corrected(values - full, values - low)
    covered = (low <= full) & (full <= high)
    print(f"within the 95 % interval: {covered.mean():.1%}", np.round(covered.mean((0, 1)), 3))
    print("half the width of the interval:", row((values - low).mean((0, 1))))
    print("1.96 times the root mean square error:", row(1.96 * rms(values - full)))


def show_corrected(errors: np.ndarray, half_widths: np.ndarray) -> None:
    """Errors at the other checkpoints, after a correction by one, and by three of them."""
    n = len(errors)
    for known in ([n // 2], [n // 4, n // 2, 3 * n // 4]):
        others = np.delete(errors, known, axis=0)
        shared = np.array(
            [
                [
                    shared_error(errors[known, seed, column], half_widths[known, seed, column])
                    for column in range(errors.shape[2])
                ]
                for seed in range(errors.shape[1])
            ]
        )
        for name, error in (("corrected", shared), ("off", errors[known].mean(axis=0))):
            print(f"{name} by {len(known):<{18 - len(name)}} {errors_row(others - error)}")


def errors_row(errors: np.ndarray) -> str:
    worst = np.abs(errors.mean(axis=1)).max(axis=0)
    return f"bias {row(errors.mean((0, 1)))}  max {row(worst)}  rms {row(rms(errors))}"


def rms(errors: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.square(errors).mean((0, 1))))


def row(values: np.ndarray) -> str:
    return " ".join(f"{value:+.4f}" for value in values)


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
    parser.add_argument("--target-error", type=float, help="chooses the share instead of --share")
    parser.add_argument("--tops", type=int, default=0, help="of the first checkpoint, by query")
    parser.add_argument("--all-ways", action="store_true", help="also those that were not chosen")
    parser.add_argument("--time", action="store_true", help="CPU seconds of a validation instead")
    arguments = parser.parse_args()
    if arguments.time:
        time_validations(arguments)
        return
    study(arguments, *vectors(arguments))


if __name__ == "__main__":
    main()
