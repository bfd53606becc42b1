"""Curves of subsets beside a full corpus's, made up."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mlflow_dr.fidelity_study.agreement import FidelityResult, SubsetCurve, compare_curves

STEPS = (100, 200, 300, 400, 500)
FULL = np.array([0.1, 0.3, 0.42, 0.4, 0.5])


@pytest.fixture
def make_curve() -> Callable[..., SubsetCurve]:
    """A function from a curve to values of 30 queries that have this mean and little noise."""

    def make(
        name: str, means: Sequence[float], seconds: float = 1.0, queries: int = 30
    ) -> SubsetCurve:
        noise = np.random.default_rng(0).normal(scale=0.05, size=30)[:queries]
        values = np.array(means)[:, None] + noise - noise.mean()
        slug = name.replace("@", "_at_").replace(":", "_")
        ids = tuple(f"q{number}" for number in range(queries))
        return SubsetCurve(name, slug, 100, ids, values, seconds)

    return make


@pytest.fixture
def make_findings(make_curve: Callable[..., SubsetCurve]) -> Callable[..., FidelityResult]:
    """A function from curves of subsets to findings; the full corpus takes 10 seconds."""

    def make(
        *subsets: SubsetCurve, full: Sequence[float] = tuple(FULL), **options: float
    ) -> FidelityResult:
        curves = [make_curve("full", full, 10.0), *subsets]
        return compare_curves("mrr@10", "sea", "dev", STEPS, curves, **options)

    return make
