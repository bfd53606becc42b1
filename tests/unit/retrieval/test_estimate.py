"""Estimates on simulated scores, whose full corpus is known."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import nbinom

from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.estimate import (
    Estimate,
    RelevantPassages,
    Sample,
    check_estimable,
    estimate,
    rank_values,
    share_for,
    tail_size,
    unseen_above,
)
from mlflow_dr.retrieval.measures import Measure, mean_values, measure_ranking, parse_measures

MEASURES = parse_measures("mrr@10 ndcg@10 recall@100")
ALL = parse_measures(
    "mrr@10 ndcg@10 recall@20 map@50 precision@5 success@3 err@10 rbp@10 "
    "mrr_rel_2@10 recall_rel_2@20 rbp_p_0.5@20"
)
DEPTH = 60


class Simulated:
    """Scores of all passages, and passages with a relevance of 1 to 3."""

    def __init__(
        self,
        n_queries: int = 60,
        n_passages: int = 4000,
        shape: float = -0.2,
        seed: int = 0,
        between: float = 0.3,
    ) -> None:
        random = np.random.default_rng(seed)
        scale = np.exp(random.normal(0, between, (n_queries, 1)))
        quantile = random.random((n_queries, n_passages))
        self.scores = scale * (quantile**-shape - 1) / shape
        self.gains = random.integers(1, 4, (n_queries, 4))
        self.relevant = np.stack([random.choice(n_passages, 4, False) for _ in range(n_queries)])
        share = np.exp(random.uniform(np.log(0.3 / n_passages), np.log(0.05), (n_queries, 4)))
        np.put_along_axis(self.scores, self.relevant, scale * (share**-shape - 1) / shape, axis=1)

    def sampled(self, share: float, seed: int = 0) -> tuple[Sample, RelevantPassages]:
        """What a sample shows; every relevant passage is encoded for its own query only."""
        n_queries, n_passages = self.scores.shape
        order = np.random.default_rng(seed).permutation(n_passages)
        chosen = np.setdiff1d(order[: round(share * n_passages)], self.relevant)
        known = np.unique(self.relevant)
        part = self.scores[:, chosen]
        best = np.argsort(-part, axis=1)[:, :DEPTH]
        by_score = np.argsort(-np.take_along_axis(self.scores, self.relevant, 1), axis=1)
        rows = np.take_along_axis(self.relevant, by_score, 1).ravel()
        query = np.repeat(np.arange(n_queries), self.relevant.shape[1])
        score = self.scores[query, rows]
        above = (part[query] > score[:, None]).sum(axis=1)
        seen = above + (self.scores[query][:, known] > score[:, None]).sum(axis=1)
        gain = np.take_along_axis(self.gains, by_score, 1).ravel()
        return (
            Sample(
                np.take_along_axis(part, best, 1),
                chosen[best],
                len(chosen),
                n_passages - len(chosen) - len(known),
            ),
            RelevantPassages(query, score, seen, np.minimum(above, DEPTH), gain),
        )

    def estimates(
        self, share: float, seed: int = 0, measures: Sequence[Measure] = MEASURES
    ) -> dict[Measure, Estimate]:
        return estimate(*self.sampled(share, seed), self.gains.tolist(), measures)

    def truth(self, measures: Sequence[Measure] = MEASURES) -> dict[str, dict[Measure, float]]:
        """By trec_eval, on all passages."""
        best = np.argsort(-self.scores, axis=1)[:, :100]
        ranking = {
            f"{query:03}": [(str(row), float(self.scores[query, row])) for row in rows]
            for query, rows in enumerate(best)
        }
        qrels = {
            f"{query:03}": dict(zip(map(str, rows), gains, strict=True))
            for query, (rows, gains) in enumerate(
                zip(self.relevant.tolist(), self.gains.tolist(), strict=True)
            )
        }
        return measure_ranking(ranking, qrels, measures)


@pytest.fixture(scope="module")
def simulated() -> Simulated:
    return Simulated()


@pytest.mark.parametrize("measure", ALL)
def test_the_whole_corpus_as_a_sample_gives_the_exact_value_of_each_query(
    simulated: Simulated, measure: Measure
) -> None:
    result = simulated.estimates(1.0, measures=[measure])[measure]
    exact = [values[measure] for values in simulated.truth([measure]).values()]
    assert result.per_query == pytest.approx(exact, abs=1e-9)
    assert result.mean == pytest.approx((np.mean(exact),) * 3)


@pytest.mark.parametrize("shape", [-0.2, -0.1])
def test_estimates_are_unbiased_and_their_intervals_cover(shape: float) -> None:
    errors, covered, naive = [], [], []
    for seed in range(6):
        simulated = Simulated(shape=shape, seed=seed)
        truth = mean_values(simulated.truth())
        results = simulated.estimates(0.05, seed)
        errors.append([results[measure].mean.value - truth[measure] for measure in MEASURES])
        covered += [
            results[measure].mean.low <= truth[measure] <= results[measure].mean.high
            for measure in MEASURES
        ]
        sample, relevant = simulated.sampled(0.05, seed)
        exact = estimate(sample._replace(unseen=0), relevant, simulated.gains.tolist(), MEASURES)
        naive.append([exact[measure].mean.value - truth[measure] for measure in MEASURES])
    assert np.mean(naive, axis=0).min() > 0.1
    assert np.abs(np.mean(errors, axis=0)).max() < 0.03  # of 60 queries, from 200 passages
    assert np.mean(covered) > 0.85


@pytest.mark.parametrize("shape", [-0.2, 0.1])
def test_the_expected_number_of_unseen_passages_is_the_true_one(shape: float) -> None:
    """Wherever it is between 1 and 60; by queries whose tails have nearly the same scale."""
    expected, true = np.zeros(2), np.zeros(2)
    for seed in range(8):
        simulated = Simulated(200, shape=shape, seed=seed, between=0.02)
        sample, relevant = simulated.sampled(0.05, seed)
        size = tail_size(10, sample.size, sample.unseen)
        found = unseen_above(sample, relevant, size).expected
        scores = simulated.scores[relevant.query]
        unseen = (scores > relevant.score[:, None]).sum(axis=1) - relevant.seen
        for end, (low, high) in enumerate([(1, 10), (10, 60)]):
            inside = (found >= low) & (found < high)
            expected[end] += found[inside].sum()
            true[end] += unseen[inside].sum()
    assert expected == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("measure", parse_measures("mrr@10 recall@10 success@10 rbp@10"), ids=str)
def test_the_number_of_unseen_passages_is_negative_binomial(
    simulated: Simulated, measure: Measure
) -> None:
    sample, relevant = simulated.sampled(0.1)
    best = np.unique(relevant.query, return_index=True)[1]  # one relevant passage for each query
    relevant = RelevantPassages(*(column[best] for column in relevant))
    gains = [[1]] * len(best)
    unseen = unseen_above(sample, relevant, tail_size(10, sample.size, sample.unseen))
    gaps = unseen.gaps[:, None, None]
    chance = nbinom.pmf(np.arange(10), gaps, gaps / (gaps + unseen.mean[:, :, None]))
    chances = (chance * unseen.weights[:, :, None]).sum(axis=1)
    values = np.append(rank_values(measure), np.zeros(10))
    ranks = np.minimum(relevant.seen, 10)[:, None] + np.arange(10)
    factor = 1 - measure.parameter("p") if measure.name == "rbp" else 1
    expected = factor * (chances * values[ranks]).sum(axis=1)
    found = estimate(sample, relevant, gains, [measure])[measure]
    assert found.per_query == pytest.approx(expected, abs=2e-3)


def test_better_relevant_passages_and_fewer_unseen_ones_give_higher_values(
    simulated: Simulated,
) -> None:
    sample, relevant = simulated.sampled(0.05)
    gains = simulated.gains.tolist()
    before = estimate(sample, relevant, gains, MEASURES)
    raised = estimate(sample, relevant._replace(score=relevant.score + 0.3), gains, MEASURES)
    fewer = estimate(sample._replace(unseen=sample.unseen // 2), relevant, gains, MEASURES)
    for measure in MEASURES:
        assert (raised[measure].per_query >= before[measure].per_query - 1e-12).all()
        assert (fewer[measure].per_query >= before[measure].per_query - 1e-12).all()
        assert raised[measure].mean.value > before[measure].mean.value


def test_no_interval_ends_above_the_value_on_the_subset(simulated: Simulated) -> None:
    sample, relevant = simulated.sampled(0.05)
    gains = simulated.gains.tolist()
    on_subset = estimate(sample._replace(unseen=0), relevant, gains, MEASURES)
    free = estimate(sample, relevant, gains, MEASURES)
    thinned = estimate(sample._replace(is_thinned=True), relevant, gains, MEASURES)
    for measure in MEASURES:
        bound = on_subset[measure].mean.value
        assert free[measure].mean.high <= bound
        assert thinned[measure].mean == pytest.approx(free[measure].mean._replace(high=bound))


def test_larger_samples_have_shorter_intervals(simulated: Simulated) -> None:
    widths = [
        [result.mean.high - result.mean.low for result in simulated.estimates(share).values()]
        for share in (0.05, 0.2, 0.6)
    ]
    assert (np.diff(widths, axis=0) < 0).all()


def test_intervals_are_in_proportion_to_the_target_error_whatever_the_queries() -> None:
    """Here every query has a relevant passage near the top, and MRR errs twice as much as usual."""
    ratios = []
    for n_queries, target in ((60, 0.08), (60, 0.03), (240, 0.03), (240, 0.04)):
        share = share_for(target, n_queries)
        estimates = [Simulated(n_queries, seed=seed).estimates(share, seed) for seed in range(3)]
        intervals = [[found[measure].mean for measure in MEASURES[:2]] for found in estimates]
        widths = [[each.value - each.low for each in pair] for pair in intervals]
        ratios.append(np.mean(widths, axis=0) / target)
    of_mrr, of_ndcg = np.transpose(ratios)
    assert of_ndcg == pytest.approx(1, abs=0.25)
    assert of_mrr == pytest.approx(2, abs=0.5)


def test_equal_scores_give_values_between_those_of_a_perfect_and_a_hopeless_encoder(
    simulated: Simulated,
) -> None:
    sample, relevant = simulated.sampled(0.05)
    equal = sample._replace(scores=np.ones_like(sample.scores))
    same = relevant._replace(score=np.ones_like(relevant.score))
    for result in estimate(equal, same, simulated.gains.tolist(), MEASURES).values():
        assert 0 <= result.mean.low <= result.mean.value <= result.mean.high < 0.1


def test_a_query_without_relevant_passages_in_the_corpus_has_0(simulated: Simulated) -> None:
    sample, relevant = simulated.sampled(0.05)
    others = relevant.query != 3
    relevant = RelevantPassages(*(part[others] for part in relevant))
    for result in estimate(sample, relevant, simulated.gains.tolist(), ALL).values():
        assert result.per_query[3] == 0


def test_bad_samples_and_measures_are_refused(simulated: Simulated) -> None:
    sample, relevant = simulated.sampled(0.05)
    gains = simulated.gains.tolist()
    for size in (0, 8):
        with pytest.raises(UsageError, match=f"the sample has {size} passages.*larger random:P%"):
            estimate(sample._replace(size=size), relevant, gains, MEASURES)
    broken = sample._replace(scores=np.where(sample.scores > 1, np.nan, sample.scores))
    with pytest.raises(ValueError, match="NaN"):
        estimate(broken, relevant, gains, MEASURES)
    with pytest.raises(UsageError, match=r"judged@10 cannot be estimated.*these can: mrr, ndcg"):
        check_estimable(parse_measures("mrr@10 judged@10"))


def test_the_smallest_sample_is_estimated(simulated: Simulated) -> None:
    scores, rows = np.sort(np.random.default_rng(0).random((60, 9)))[:, ::-1], np.arange(9)
    sample = Sample(scores, np.tile(rows, (60, 1)), 9, 100)
    relevant = simulated.sampled(0.05)[1]
    results = estimate(sample, relevant, simulated.gains.tolist(), MEASURES)
    assert all(np.isfinite(result.mean).all() for result in results.values())
