"""Estimates are corrected by checkpoints that were also validated on the full corpus.

An estimate's error is much the same at all checkpoints of a run: they share the sample and the
queries. So the mean error where it is known is taken off the others (a difference estimator;
Cochran, Sampling Techniques, 1977). That does not change the order of checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.validations import Metric, metric_points

SAME_DATA = ("corpus", "topics", "split", "keep_own_id")
FULL_CORPUS = "full"


class Correction(NamedTuple):
    """What is known of the error of a run's estimates.

    Attributes:
        validation: the validation on the full corpus.
        error: how much too high estimates are, on average.
        steps: of the checkpoints at which this is known.
    """

    validation: str
    error: float
    steps: tuple[int, ...]

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return (
            f"estimates are {self.error:+.4f} off at {'step' if len(self.steps) == 1 else 'steps'} "
            f"{steps}, by {self.validation}"
        )


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
    found: list[Correction] = []
    for name, other in configs.items():
        is_same = all(other.get(key) == config.get(key) for key in SAME_DATA)
        if other.get("subset") == FULL_CORPUS and is_same:
            full = dict(metric_points(checkpoints, Metric(name, metric.key)))
            if steps := tuple(sorted(full.keys() & estimates.keys())):
                errors = [estimates[step] - full[step] for step in steps]
                found.append(Correction(name, float(np.mean(errors)), steps))
    return max(found, key=lambda correction: len(correction.steps), default=None)
