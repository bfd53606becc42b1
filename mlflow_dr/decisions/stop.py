"""When to stop: a measure that has not risen for some checkpoints in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from statistics import median

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import State, validation_state
from mlflow_dr.tracking.runs import TrackedRun, is_over
from mlflow_dr.tracking.stop_request import STOP_TAG, request_stop
from mlflow_dr.tracking.validations import Metric, metric_error, metric_points

log = logging.getLogger(__name__)

PLATEAU_TAG = "mlflow_dr.plateau_step"


def check_patience(patience: int, min_delta: float) -> None:
    """Refuse settings that cannot find a plateau.

    Raises:
        UsageError: patience is below 1, or min_delta is below 0 or no number.
    """
    if patience < 1:
        raise UsageError(f"patience is {patience}; it must be at least 1 checkpoint")
    if not 0 <= min_delta < math.inf:
        raise UsageError(f"min_delta is {min_delta}; it must be a number, 0 or above")


def plateau(
    points: Iterable[tuple[int, float]],
    patience: int,
    min_delta: float = 0.0,
    waiting: Collection[int] = (),
    since: int | None = None,
    metric: str = "the measure",
    sign: int = 1,
) -> str | None:
    """Why training may stop: none of the last checkpoints is better than those before them.

    The last `patience` checkpoints by step, in whatever order they were done, are compared with the
    best before them. Nothing is decided while one of the last checkpoints is not validated yet,
    because it might be better. Other unvalidated checkpoints cannot change the decision.

    Args:
        points: step and value of each checkpoint that is done; higher is better, and one that is
            not a number is worse than all.
        patience: how many checkpoints in a row.
        min_delta: an increase must exceed this to count as an improvement.
        waiting: steps of checkpoints that are still to be done.
        since: count checkpoints after this step only; those before it are compared with.
        metric: its name, for the reason.
        sign: what values were multiplied by so that higher is better, for the reason.

    Returns:
        The reason; None where training is to go on.

    Raises:
        UsageError: patience or min_delta makes no sense.
    """
    check_patience(patience, min_delta)
    values: dict[int, float] = {}
    for step, value in points:
        values[step] = max(values.get(step, -math.inf), -math.inf if math.isnan(value) else value)
    steps = sorted(values)
    before, counted = steps[:-patience], steps[-patience:]
    if not before or (since is not None and counted[0] <= since):
        return None
    best_before = max(values[step] for step in before)
    risen = max(values[step] for step in counted) > best_before + min_delta
    if risen or best_before == -math.inf:
        return None
    if any(counted[0] < step < counted[-1] for step in waiting):
        return None
    best, last = max(steps, key=lambda step: values[step]), steps[-1]
    many = "1 checkpoint" if patience == 1 else f"{patience} checkpoints"
    by = f" by more than {min_delta:g}" if min_delta else ""
    return (
        f"{metric} has not {'risen' if sign > 0 else 'fallen'}{by} for {many}: best "
        f"{sign * values[best]:.4f} at step {best}, last {_shown(values[last], sign)} at step "
        f"{last}"
    )


def stop_if_plateau(
    run: TrackedRun,
    checkpoints: Collection[Checkpoint],
    metric: Metric,
    patience: int,
    min_delta: float = 0.0,
    waiting: Iterable[Checkpoint] | None = None,
) -> str | None:
    """Ask the trainer of a run to end if a metric has not improved for some checkpoints.

    A run that is over, or that has a stop request, is left alone. A training that goes on after
    such a request gets as many new checkpoints before the next one.

    Args:
        run: whose trainer.
        checkpoints: of that run, as they were seen last.
        metric: the metric that should rise.
        patience: how many checkpoints in a row may pass without an improvement.
        min_delta: an increase must exceed this to count as an improvement. If the values are
            estimates, it must also exceed half the width of their intervals, the median of them.
        waiting: those that some validator will still do; when None, all that are READY and neither
            done nor failed.

    Returns:
        The reason if the request was made now; else None.

    Raises:
        UsageError: patience or min_delta makes no sense.
        TrackingError: the server does not answer.
    """
    sign = metric.sign
    points = [(step, sign * value) for step, value in metric_points(checkpoints, metric)]
    errors = [metric_error(each, metric) for each in checkpoints if each.ready]
    min_delta = max(min_delta, median([error for error in errors if error] or [0.0]))
    candidates = checkpoints if waiting is None else waiting
    left = {
        checkpoint.step for checkpoint in candidates if _is_waiting(checkpoint, metric.validation)
    }
    if plateau(points, patience, min_delta, left) is None:
        return None
    state = run.fetch()
    if is_over(state) or state.data.tags.get(STOP_TAG):
        return None
    since = state.data.tags.get(PLATEAU_TAG)
    reason = plateau(
        points,
        patience,
        min_delta,
        left,
        since=int(since) if since else None,
        metric=str(metric),
        sign=sign,
    )
    if reason is not None:
        request_stop(run, reason)
        run.set_tags({PLATEAU_TAG: str(max(step for step, _ in points))})
        log.info("training of run %s is asked to end: %s", run.id, reason)
    return reason


def _is_waiting(checkpoint: Checkpoint, validation: str) -> bool:
    is_open = validation_state(checkpoint, validation) is State.OPEN
    return checkpoint.ready and not checkpoint.is_pruned and is_open


def _shown(value: float, sign: int) -> str:
    return "nan" if value == -math.inf else f"{sign * value:.4f}"
