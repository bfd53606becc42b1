"""How much of an error at some checkpoints is taken off the estimates at all of them."""

import numpy as np
import pytest

from mlflow_dr.decisions.correction import shared_error


def test_an_error_that_chance_explains_is_hardly_taken_off() -> None:
    assert shared_error([0.001], [0.02]) == pytest.approx(0, abs=1e-4)
    assert shared_error([-0.05], [0.02]) == pytest.approx(-0.049, abs=1e-3)
    assert shared_error([0.02], [0.0]) == pytest.approx(0.02)
    assert shared_error([0.01, -0.01], [0.0, 0.0]) == 0


def test_more_checkpoints_make_an_error_more_certain() -> None:
    shared = [shared_error([0.01] * count, [0.02] * count) for count in (1, 2, 4, 100)]
    assert shared == sorted(shared)
    assert shared[-1] == pytest.approx(0.01, rel=0.02)


def test_the_correction_errs_less_than_the_whole_error_or_nothing() -> None:
    """If the part that estimates share is as large as the part that they do not."""
    random = np.random.default_rng(0)
    common, own = random.normal(0, 0.01, 4000), random.normal(0, 0.01, 4000)
    width = 1.96 * 0.01 * np.sqrt(3)  # a third of the variance is of the checkpoint
    left = common - [shared_error([error], [width]) for error in common + own]
    assert np.mean(left**2) < 0.95 * min(np.mean(own**2), np.mean(common**2))
