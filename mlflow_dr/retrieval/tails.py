"""The far end of the distribution of each query's scores, from the highest scores of a sample.

Above a threshold, excesses follow a generalised Pareto distribution. Its shape is common to all
queries, because a few scores say little about a shape. Its scale is the query's own. The few
scores leave the scale uncertain, too, so that it is not one number but several with weights: its
posterior, given that the scales of all queries are log-normal around a common one. The shape is the
one under which the scores of all queries are likeliest when scales are unknown.

Sources: Pickands, Statistical Inference Using Extreme Order Statistics, Annals of Statistics 1975
(excesses are generalised Pareto). Neyman and Scott, Consistent Estimates Based on Partially
Consistent Observations, Econometrica 1948 (why scales are averaged over and not fitted). Morris,
Parametric Empirical Bayes Inference, Journal of the American Statistical Association 1983.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SHAPES = (-1.0, 0.45)  # variances exist up to 0.5
NEAR_EXPONENTIAL = 1e-6
SCALES = np.linspace(-2.5, 2.5, 9)  # in standard deviations of the posterior
LEAST_SPREAD = 0.05  # of the logarithms of scales between queries
IMPOSSIBLE = -1e9


class Tail(NamedTuple):
    """The scores above a threshold, of each query.

    Attributes:
        threshold: the score above which the tail is, `(n_queries,) float64`.
        shape: of the distributions of all queries; 0 is exponential, and below it they end.
        scales: those that are possible, `(n_queries, n_scales) float64`.
        weights: the probability of each, `(n_queries, n_scales) float64`.
    """

    threshold: np.ndarray
    shape: float
    scales: np.ndarray
    weights: np.ndarray

    def survival(self, query: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The share of a tail that is above a score, for each scale, `(n, n_scales) float64`.

        Args:
            query: the positions of queries, `(n,) int64`.
            score: a score for each, `(n,)`; below the threshold, the share is 1.
        """
        above = np.maximum(score - self.threshold[query], 0)[:, None]
        scales = self.scales[query]
        no_scale = np.where(above > 0, np.inf, np.zeros_like(scales))  # if all scores are equal
        steps = np.divide(above, scales, out=no_scale, where=scales > 0)
        if abs(self.shape) < NEAR_EXPONENTIAL:
            return np.asarray(np.exp(-steps))
        inside = np.maximum(1 + self.shape * np.minimum(steps, 1e9), 0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.exp(-np.log(inside) / self.shape))


def fit_tail(scores: np.ndarray, size: int) -> Tail:
    """The tails of all queries.

    Args:
        scores: descending, `(n_queries, depth)`; the first `size + 1` are finite.
        size: how many scores a tail has; the threshold is the score below them.
    """
    from scipy.optimize import minimize_scalar

    threshold = scores[:, size].astype(np.float64)
    excess = scores[:, :size] - threshold[:, None]
    has_tail = excess.mean(axis=1) > 0  # of queries whose scores are all equal nothing is learnt
    scales = np.zeros((len(excess), len(SCALES)))
    weights = np.full_like(scales, 1 / len(SCALES))
    if not has_tail.any():
        return Tail(threshold, 0.0, scales, weights)

    def unlikely(shape: float) -> float:
        return -_posterior(excess[has_tail], shape)[2]

    shape = float(minimize_scalar(unlikely, bounds=SHAPES, options={"xatol": 0.002}).x)
    scales[has_tail], weights[has_tail], _ = _posterior(excess[has_tail], shape)
    return Tail(threshold, shape, scales, weights)


def _posterior(excess: np.ndarray, shape: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Scales of the queries, their weights, and the log-likelihood of all scores.

    The logarithm of a mean excess varies because scales do, and because it is a mean of few. The
    second is known, and what is left is the variance between queries.

    Args:
        excess: scores less their threshold, descending, `(n_queries, size) float64`; of each query,
            some are above 0.
        shape: of the distribution.
    """
    from scipy.special import digamma, polygamma

    if abs(shape) < NEAR_EXPONENTIAL:
        shape = NEAR_EXPONENTIAL
    size = excess.shape[1]
    # a mean of `size` varies as one of so many exponential excesses does
    equal_size = size * (1 - 2 * shape)
    log_mean = np.log(excess.mean(axis=1))
    centre = log_mean.mean() - (digamma(equal_size) - np.log(equal_size))
    between = max(log_mean.var() - polygamma(1, equal_size), LEAST_SPREAD**2)
    precision = equal_size + 1 / between
    own_centre = (log_mean * equal_size + centre / between) / precision
    means = own_centre[:, None] + SCALES / np.sqrt(precision)
    scales = np.exp(means) * (1 - shape)
    ratio = shape / scales
    logs = np.zeros_like(scales)
    for start in range(0, size, 8):  # logarithms of products of a few cost less than of each
        product = np.ones_like(scales)
        for column in excess[:, start : start + 8].T:
            product *= 1 + column[:, None] * ratio
        logs += np.log(np.maximum(product, 1e-300))
    likelihood = -size * np.log(scales) - (1 / shape + 1) * logs
    likelihood = np.where(1 + excess[:, :1] * ratio > 0, likelihood, IMPOSSIBLE)
    joint = likelihood - (means - centre) ** 2 / (2 * between)
    highest = joint.max(axis=1, keepdims=True)
    weights = np.exp(joint - highest)
    total = weights.sum(axis=1, keepdims=True)
    constant = len(excess) * 0.5 * np.log(between * precision)
    return scales, weights / total, float((highest + np.log(total)).sum() - constant)
