"""Tails of scores whose distribution is known."""

import numpy as np
import pytest

from mlflow_dr.retrieval.tails import Tail, fit_tail

ONE = np.zeros(1, np.int64)


def drawn(shape: float, n_queries: int, between: float = 0.5, seed: int = 1) -> np.ndarray:
    """Nine scores of each query, the lowest 0; `between` is the spread of the log scales."""
    random = np.random.default_rng(seed)
    uniform = random.random((n_queries, 8))
    excess = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
    excess *= np.exp(random.normal(0, between, (n_queries, 1)))
    return np.hstack([-np.sort(-excess, axis=1), np.zeros((n_queries, 1))])


@pytest.mark.parametrize("shape", [-0.4, -0.2, 0.0, 0.2])
@pytest.mark.parametrize("between", [0.0, 1.0])
def test_the_shape_of_tails_is_found_whatever_their_scales(shape: float, between: float) -> None:
    assert fit_tail(drawn(shape, 3000, between), 8).shape == pytest.approx(shape, abs=0.04)


@pytest.mark.parametrize("shape", [-0.2, 0.1])
@pytest.mark.parametrize("between", [0.1, 0.6])
def test_survival_is_right_on_average_far_beyond_the_scores(shape: float, between: float) -> None:
    n_queries = 4000
    tail = fit_tail(drawn(shape, n_queries, between), 8)
    random = np.random.default_rng(2)
    level = (0.01**-shape - 1) / shape  # one in a hundred is above, where the scale is 1
    share = (tail.survival(np.arange(n_queries), np.full(n_queries, level)) * tail.weights).sum(1)
    excess = (random.random((n_queries, 200)) ** -shape - 1) / shape
    excess *= np.exp(random.normal(0, between, (n_queries, 1)))
    assert share.mean() == pytest.approx((excess > level).mean(), rel=0.15)


def test_scales_of_queries_are_drawn_to_each_other_if_they_hardly_differ() -> None:
    spreads = []
    for between in (0.0, 1.0):
        tail = fit_tail(drawn(0.0, 500, between), 8)
        centre = (np.log(tail.scales) * tail.weights).sum(axis=1)
        spreads.append(centre.std())
    assert spreads[0] < 0.1
    assert spreads[1] == pytest.approx(1, abs=0.15)


def test_survival_falls_from_1_at_the_threshold_to_0_beyond_the_end() -> None:
    tail = Tail(np.array([2.0]), -0.5, np.array([[1.0]]), np.array([[1.0]]))
    shares = [float(tail.survival(ONE, np.array([score]))[0, 0]) for score in (1, 2, 3, 3.9, 4, 9)]
    assert shares == pytest.approx([1, 1, 0.25, 0.0025, 0, 0])


def test_an_exponential_tail_is_the_limit_of_its_neighbours() -> None:
    tails = [
        Tail(np.zeros(1), shape, np.ones((1, 1)), np.ones((1, 1))) for shape in (-1e-5, 0, 1e-5)
    ]
    shares = [float(tail.survival(ONE, np.array([3.0]))[0, 0]) for tail in tails]
    assert shares == pytest.approx([np.exp(-3)] * 3, rel=1e-3)


def test_equal_scores_have_no_tail() -> None:
    scores = np.vstack([np.ones((3, 9)), drawn(0.0, 50)])
    for tail in (fit_tail(scores, 8), fit_tail(scores[:3], 8)):
        above = tail.survival(np.repeat(ONE, 2), np.array([1.0, 1.1]))
        assert above[0] == pytest.approx(1)
        assert above[1] == pytest.approx(0)
        assert np.isfinite(tail.weights).all()
        assert tail.weights.sum(axis=1) == pytest.approx(1)


def test_a_single_query_has_a_tail() -> None:
    tail = fit_tail(drawn(0.0, 1), 8)
    assert np.isfinite(tail.scales).all()
    assert 0 < (tail.survival(ONE, np.array([1.0])) * tail.weights).sum() < 1
