"""Tests of significance, against scipy on the same values and against what is known."""

import itertools
import time

import numpy as np
import pytest
from scipy import stats

from mlflow_dr.decisions.significance import (
    bootstrap_interval,
    difference,
    holm,
    randomisation_test,
)

RECIPROCALS = np.array([0, *(1 / rank for rank in range(1, 11))])


def reciprocal_ranks(queries: int, seed: int, better: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two encoders' reciprocal ranks, as MRR@10 has them; many are the same."""
    generator = np.random.default_rng(seed)
    first = generator.choice(RECIPROCALS, queries)
    other = generator.choice(RECIPROCALS, queries) + better
    return first, np.where(generator.random(queries) < 0.4, first, other)


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(values, axis=axis)


def scipys_test(first: np.ndarray, second: np.ndarray, resamples: float) -> float:
    found = stats.permutation_test(
        (second - first,), mean, permutation_type="samples", n_resamples=resamples, rng=0
    )
    return float(found.pvalue)


@pytest.mark.parametrize("queries", [2, 3, 7, 12])
@pytest.mark.parametrize("seed", range(4))
def test_the_test_of_few_queries_is_exact_and_equals_scipys(queries: int, seed: int) -> None:
    first, second = reciprocal_ranks(queries, seed)
    p_value = randomisation_test(first, second)
    assert p_value == pytest.approx(scipys_test(first, second, np.inf))
    assert p_value == randomisation_test(second, first)
    changes = second - first
    means = [np.mean(changes * signs) for signs in itertools.product((1, -1), repeat=queries)]
    expected = np.mean(np.abs(means) >= abs(changes.mean()) - 1e-12)
    assert p_value == pytest.approx(expected)


@pytest.mark.parametrize("better", [0.0, 0.05, 0.1])
def test_the_test_of_many_queries_is_close_to_scipys(better: float) -> None:
    first, second = reciprocal_ranks(200, 3, better)
    p_value = randomisation_test(first, second, seed=1)
    expected = scipys_test(first, second, 9999)
    error = np.sqrt(expected * (1 - expected) / 9999)
    assert abs(p_value - expected) < 5 * error + 2e-4


def test_the_test_holds_its_level() -> None:
    """Of equal encoders a twentieth has a p-value of at most a twentieth."""
    generator = np.random.default_rng(0)
    found = [
        randomisation_test(np.zeros(30), generator.normal(size=30), seed, resamples=499)
        for seed in range(400)
    ]
    assert 0.025 < np.mean(np.array(found) <= 0.05) < 0.08


def test_known_p_values() -> None:
    ones, zeros = np.ones(5), np.zeros(5)
    assert randomisation_test(zeros, ones) == 2 / 2**5
    assert randomisation_test(zeros, zeros) == 1.0
    # the least that 9,999 random ones and the observed one can say
    assert randomisation_test(np.zeros(300), np.ones(300)) == 1 / 10_000


def test_rounding_does_not_tell_equal_sums_apart() -> None:
    """Signs that are all as observed give the observed sum, in whichever order it is summed."""
    changes = np.full(12, 0.1)
    changes[3] = -0.3
    assert randomisation_test(np.zeros(12), changes) == pytest.approx(
        scipys_test(np.zeros(12), changes, np.inf)
    )


@pytest.mark.parametrize("queries", [2, 50, 1500])
def test_the_interval_equals_scipys(queries: int) -> None:
    first, second = reciprocal_ranks(queries, 5)
    found = stats.bootstrap(
        (first, second),
        lambda a, b, axis: np.mean(b - a, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    low, high = bootstrap_interval(first, second, seed=8)
    spread = (second - first).std() / np.sqrt(queries)
    assert (low, high) == pytest.approx(tuple(found), abs=0.15 * spread + 1e-9)
    assert low <= (second - first).mean() <= high


def test_every_figure_of_a_difference() -> None:
    first, second = reciprocal_ranks(60, 2, 0.2)
    found = difference(first, second, seed=3)
    assert found.mean == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == bootstrap_interval(first, second, seed=3)
    assert found.p_value == randomisation_test(first, second, seed=3)
    assert found.queries == 60
    assert found == difference(first, second, seed=3)
    assert found != difference(first, second, seed=4)


def test_a_single_query_has_a_p_value_of_1() -> None:
    found = difference(np.array([0.25]), np.array([1.0]))
    assert found == (0.75, 0.75, 0.75, 1.0, 1)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0, 2.0], [1.0], r"shapes \(2,\) and \(1,\)"),
        ([], [], r"shapes \(0,\)"),
        ([1.0, np.nan], [1.0, 2.0], "1 values are not finite"),
        ([1.0, 1.0], [np.inf, np.nan], "2 values are not finite"),
    ],
)
def test_malformed_values_are_refused(
    first: list[float], second: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        difference(np.array(first), np.array(second))


def test_holms_own_rule() -> None:
    # multiplied by 3, 2 and 1 from the smallest on, and never below one before
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_ten_thousand_queries_take_seconds_at_most() -> None:
    first, second = reciprocal_ranks(10_000, 1)
    difference(first[:10], second[:10])
    start = time.process_time()
    difference(first, second)
    assert time.process_time() - start < 5
