"""Figures and intervals against SciPy's on the same values."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from mlflow_dr.fidelity_study import agreement as module
from mlflow_dr.fidelity_study.agreement import FIGURES, agreement, spread

RESAMPLES = 200


def curves(seed: int, queries: int = 40, checkpoints: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal ranks on the full corpus, and on a subset, where they are a little higher."""
    generator = np.random.default_rng(seed)
    worse = np.linspace(12, 3, checkpoints)[:, None] * generator.uniform(0.2, 2, queries)
    ranks = 1 + generator.poisson(worse)
    subset = 1 + generator.binomial(ranks - 1, 0.4)
    return np.where(ranks > 10, 0.0, 1 / ranks), np.where(subset > 10, 0.0, 1 / subset)


def by_scipy(subset: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """The figures of two curves, as they are defined."""
    subset, full = subset.round(12), full.round(12)
    return {
        "tau": stats.kendalltau(subset, full).statistic,
        "pearson": stats.pearsonr(subset, full).statistic,
        "regret": full.max() - full[list(subset).index(subset.max())],
        "inflation": subset.mean() - full.mean(),
    }


@pytest.mark.parametrize("seed", range(5))
def test_figures_and_intervals_equal_scipys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    full, subset = curves(seed)
    monkeypatch.setattr(module, "CELLS", 40 * 77)  # several blocks
    found = agreement(full, subset, resamples=RESAMPLES, seed=seed)
    for name in FIGURES:

        def figure(queries: np.ndarray, name: str = name) -> float:
            return by_scipy(subset[:, queries].mean(axis=1), full[:, queries].mean(axis=1))[name]

        interval = stats.bootstrap(
            (np.arange(40),),
            figure,
            n_resamples=RESAMPLES,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        wanted = (figure(np.arange(40)), interval.low, interval.high)
        assert getattr(found, name) == pytest.approx(wanted, abs=1e-9), name


def test_sampled_queries_are_resampled_together_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As SciPy resamples two independent samples: the subset's queries, and the rest."""
    full, values = curves(3)
    own = np.array([7, 3, 31, 30, 12, 25, 0, 18])
    rest = np.setdiff1d(np.arange(40), own)
    subset = values[:, own]
    found = agreement(full, subset, own, RESAMPLES, seed=5)

    def tau(mine: np.ndarray, others: np.ndarray) -> float:
        curve = full[:, np.concatenate([own[mine], rest[others]])].mean(axis=1)
        return by_scipy(subset[:, mine].mean(axis=1), curve)["tau"]

    interval = stats.bootstrap(
        (np.arange(8), np.arange(32)),
        tau,
        n_resamples=RESAMPLES,
        batch=RESAMPLES,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(5),
    ).confidence_interval
    wanted = (tau(np.arange(8), np.arange(32)), interval.low, interval.high)
    assert found.tau == pytest.approx(wanted, abs=1e-9)
    assert found.inflation.value == pytest.approx((subset.mean(axis=1) - full.mean(axis=1)).mean())


def test_ties_use_kendalls_tau_b_and_the_earliest_is_chosen() -> None:
    # the second and third checkpoint are equal but for the order of the queries, and rounding
    full = np.array([[0.1, 0.2, 0.3], [0.1, 0.7, 0.4], [0.7, 0.4, 0.1], [0.2, 0.2, 0.2]])
    subset = np.array([[0.5, 0.1, 0.0], [1.0, 0.3, 0.2], [0.2, 0.3, 1.0], [1.0, 0.3, 0.2]])
    found = agreement(full, subset, resamples=0)
    curves = subset.mean(axis=1).round(12), full.mean(axis=1).round(12)
    assert found.tau.value == pytest.approx(stats.kendalltau(*curves).statistic)
    assert found.regret == pytest.approx((0, math.nan, math.nan), nan_ok=True)
    swapped = agreement(subset, full, resamples=0)
    assert swapped.regret.value == 0


def test_regret_is_the_loss_of_the_subsets_choice() -> None:
    full = np.array([[0.2, 0.2], [0.6, 0.4], [0.3, 0.4]])
    subset = np.array([[0.2, 0.3], [0.8, 0.2], [1.0, 0.1]])
    assert agreement(full, subset, resamples=0).regret.value == pytest.approx(0.5 - 0.35)


@pytest.mark.parametrize("constant", ["full", "subset"])
def test_a_constant_curve_has_no_correlation(constant: str) -> None:
    full, subset = curves(0)
    flat = np.full_like(full, 0.1)
    found = agreement(flat, subset) if constant == "full" else agreement(full, flat)
    for statistic in (found.tau, found.pearson):
        assert not statistic.is_defined
        assert not statistic.has_interval
    assert found.regret.is_defined
    assert found.inflation.has_interval


def test_one_query_has_no_interval() -> None:
    full, subset = curves(1)
    found = agreement(full, subset[:, :1], np.array([0]))
    assert found.tau.is_defined
    assert not any(statistic.has_interval for statistic in found)


def test_a_large_study_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    full, subset = generator.random((2, 8, 10_000))
    start = time.process_time()
    found = agreement(full, subset)
    assert time.process_time() - start < 10
    assert found.tau.has_interval


@pytest.mark.parametrize(
    ("lift", "is_flat"), [(0.0, True), (0.01, True), (0.5, False)], ids=["equal", "noise", "lift"]
)
def test_a_flat_curve_is_reported(lift: float, is_flat: bool) -> None:
    generator = np.random.default_rng(2)
    full = generator.random(100) * np.ones((8, 1)) + 0.3 * generator.random((8, 100))
    found = spread(full + np.linspace(0, lift, 8)[:, None])
    assert found.is_flat == is_flat


def test_equal_checkpoints_rarely_differ_significantly() -> None:
    """Chance exceeds the limit in about 5 of 100 cases."""
    generator = np.random.default_rng(4)

    def is_flat(number: int) -> bool:
        return spread(generator.random((6, 50)), resamples=300, seed=number).is_flat

    assert 0.88 <= np.mean([is_flat(number) for number in range(200)]) <= 0.99


def test_the_same_seed_gives_the_same_intervals() -> None:
    full, subset = curves(0)
    first, again, other = (agreement(full, subset, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.pearson.value == other.pearson.value
    assert first.pearson.low != other.pearson.low
