"""Estimates are corrected by checkpoints that were also validated on the full corpus.

An estimate's error is much the same at all checkpoints of a run: they share the sample and the
queries (a difference estimator; Cochran, Sampling Techniques, 1977). But it also has a part of its
own at each checkpoint, which would be wrong to take off the others. So only that share of the mean
error is taken off by which its square exceeds what that part alone would give (Efron and Morris,
Data Analysis Using Stein's Estimator, Journal of the American Statistical Association 1975). That
does not change the order of checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlflow_dr.retrieval.estimate import NORMAL_95
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.validations import Metric, metric_points

OWN_PART = 1 / 3  # of an error's variance; on twelve curves it is 0.27 on average, 0.08 to 0.69
SAME_DATA = ("corpus", "topics", "split", "keep_own_id")
FULL_CORPUS = "full"


class Correction(NamedTuple):
    """What is known of the error of a run's estimates.

    Attributes:
        validation: the validation on the full corpus.
        error: how much too high estimates are at the checkpoints of `steps`, on average.
        shared: how much of this is taken off all estimates.
        steps: of the checkpoints at which the error is known.
    """

    validation: str
    error: float
    shared: float
    steps: tuple[int, ...]

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return (
            f"estimates are {self.error:+.4f} off at {'step' if len(self.steps) == 1 else 'steps'} "
            f"{steps}, by {self.validation}, of which {self.shared:+.4f} is taken off"
        )


def shared_error(errors: Sequence[float], half_widths: Sequence[float]) -> float:
    """The part of an error that estimates at all checkpoints are likely to have.

    Args:
        errors: how much too high estimates are, where this is known.
        half_widths: from each of these estimates to the end of its 95 % interval.
    """
    mean = float(np.mean(errors))
    own = OWN_PART * float(np.mean(np.square(half_widths))) / NORMAL_95**2 / len(errors)
    return mean * mean**2 / (mean**2 + own) if mean else 0.0


def find_correction(
    checkpoints: Collection[Checkpoint],
    configs: Mapping[str, Mapping[str, object]],
    metric: Metric,
) -> Correction | None:
    """The correction of a run's estimates, None if its values are none or nothing is known.

    Args:
        checkpoints: of the run.
        configs: the run's validations, as `run_validations` gives them.
        metric: the estimated measure. Of several validations on the full corpus, the one that has
            the most checkpoints in common with it counts.
    """
    config = configs.get(metric.validation, {})
    if not config.get("estimate"):
        return None
    estimates = dict(metric_points(checkpoints, metric))
    lows = dict(metric_points(checkpoints, Metric(metric.validation, f"{metric.key}/low")))
    found: list[Correction] = []
    for name, other in configs.items():
        is_same = all(other.get(key) == config.get(key) for key in SAME_DATA)
        if other.get("subset") == FULL_CORPUS and is_same:
            full = dict(metric_points(checkpoints, Metric(name, metric.key)))
            if steps := tuple(sorted(full.keys() & estimates.keys())):
                errors = [estimates[step] - full[step] for step in steps]
                widths = [estimates[step] - lows.get(step, estimates[step]) for step in steps]
                shared = shared_error(errors, widths)
                found.append(Correction(name, float(np.mean(errors)), shared, steps))
    return max(found, key=lambda correction: len(correction.steps), default=None)
