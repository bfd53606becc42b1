"""Which checkpoint of a run is best, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mlflow_dr.decisions.comparison import aligned_values
from mlflow_dr.decisions.correction import find_correction
from mlflow_dr.decisions.significance import Difference, difference, mean_interval
from mlflow_dr.errors import DataError, NoValuesError, TrackingError
from mlflow_dr.retrieval.measures import recorded_measures
from mlflow_dr.tracking.artifacts import per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.descriptions import describe_run
from mlflow_dr.tracking.registry import BEST_TAG, tag_best, untag_best
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import (
    Metric,
    chosen_metric,
    metric_error,
    metric_value,
    run_validations,
)


class Scored(NamedTuple):
    """A checkpoint and its value.

    Attributes:
        checkpoint: which.
        value: of the metric.
        error: half the width of its 95 % interval if it is an estimate, else 0.
    """

    checkpoint: Checkpoint
    value: float
    error: float = 0.0

    def __str__(self) -> str:
        interval = f" (estimate, 95 % +-{self.error:.4f})" if self.error else ""
        return f"step {self.checkpoint.step}, {self.checkpoint.uri}, {self.value:.4f}{interval}"


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run by a metric.

    Attributes:
        metric: the metric that was used.
        first: the best checkpoint; among equal values the earliest.
        runner_up: the second best; None if there is no other.
        marked_before: other checkpoints that are tagged as best by this validation.
    """

    metric: Metric
    first: Scored
    runner_up: Scored | None
    marked_before: tuple[Checkpoint, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The best one."""
        return self.first.checkpoint

    @property
    def uri(self) -> str:
        """The name of the best one, `models:/<id>`."""
        return self.checkpoint.uri

    def __repr__(self) -> str:
        return f"{self.first} ({self.metric})"

    @property
    def is_tied(self) -> bool:
        """Whether the runner-up is as good."""
        return self.runner_up is not None and self.runner_up.value == self.first.value


def find_best(run: TrackedRun, metric: Metric | str | None = None) -> Best:
    """The READY checkpoint with the highest value of a metric; among equal values the earliest.

    Args:
        run: whose checkpoints.
        metric: a measure of a validation, or its name, such as `val/mrr_at_10`; the first measure
            of the validation that began first when None.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: there is no value yet, or the server does not answer.
    """
    chosen = metric if isinstance(metric, Metric) else chosen_metric(run, metric)
    checkpoints = run_checkpoints(run)
    ready = [checkpoint for checkpoint in checkpoints if checkpoint.ready]
    scored = [
        Scored(checkpoint, value, metric_error(checkpoint, chosen))
        for checkpoint in ready
        if (value := metric_value(checkpoint, chosen)) is not None and not math.isnan(value)
    ]
    if not scored:
        raise TrackingError(
            f"run {run.id}: none of {len(ready)} published checkpoints has a value of {chosen} "
            f"yet; `mlflow-dr validate --run-id {run.id}` measures them"
        )
    scored.sort(
        key=lambda entry: (
            -chosen.sign * entry.value,
            entry.checkpoint.step,
            entry.checkpoint.created_ms,
        )
    )
    first = scored[0]
    marked = (
        checkpoint for checkpoint in checkpoints if BEST_TAG + chosen.validation in checkpoint.tags
    )
    return Best(
        chosen,
        first,
        scored[1] if len(scored) > 1 else None,
        tuple(
            checkpoint for checkpoint in marked if checkpoint.model_id != first.checkpoint.model_id
        ),
    )


def mark_best(run: TrackedRun, best: Best) -> None:
    """Tag the run with its best checkpoint, and that checkpoint with its value; untag all others.

    The run's description then says so, too.

    Raises:
        TrackingError: the server did not take it.
    """
    name, checkpoint = best.metric.validation, best.checkpoint
    interval = value_interval(run, checkpoint, best.metric)
    shown = f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    tag_best(run, name, checkpoint, str(best.metric), best.first.value, shown)
    untag_best(run, name, best.marked_before)
    describe_run(run)


def value_interval(
    run: TrackedRun, checkpoint: Checkpoint, metric: Metric
) -> tuple[float, float] | None:
    """The 95 % bootstrap interval over queries of a metric; None without values of single queries.

    It is wider by the error of an estimate.

    Raises:
        TrackingError: the server does not answer.
    """
    try:
        table = per_query_values(run, checkpoint, metric.validation)
        _, values = aligned_values([checkpoint.uri], [table], *recorded_measures(metric.key))
    except (NoValuesError, DataError):  # there are none, or they are damaged
        return None
    low, high = mean_interval(values[0])
    mean, error = float(values[0].mean()), metric_error(checkpoint, metric)
    return mean - math.hypot(mean - low, error), mean + math.hypot(high - mean, error)


def against_runner_up(run: TrackedRun, best: Best, seed: int = 0) -> Difference | None:
    """The difference between the best checkpoint and the second best; None if there is no other.

    If their values are estimates, its interval has the errors of these, too.

    Args:
        run: whose checkpoints they are.
        best: what `find_best` has found.
        seed: random seed of the test and the bootstrap.

    Raises:
        NoValuesError: the values of single queries are not there.
        DataError: they are not of the same queries, or damaged.
        TrackingError: the server does not answer.
    """
    if best.runner_up is None:
        return None
    pair = (best.runner_up.checkpoint, best.checkpoint)
    tables = [per_query_values(run, checkpoint, best.metric.validation) for checkpoint in pair]
    _, values = aligned_values(
        [checkpoint.uri for checkpoint in pair], tables, *recorded_measures(best.metric.key)
    )
    change = difference(values[0], values[1], seed)
    errors = (best.runner_up.error, best.first.error)
    return change.widened(*errors) if any(errors) else change


def best_summary(run: TrackedRun, best: Best, seed: int = 0) -> str:
    """The best checkpoint and its lead over the runner-up, in a few lines.

    Raises:
        DataError: the values of single queries are damaged, or not of the same queries.
        TrackingError: the server does not answer.
    """
    lines = [f"best checkpoint of run {run.id} by {best.metric}: {best.first}"]
    if best.checkpoint.is_pruned:
        lines.append("  its files were deleted; its figures are all that is left")
    if best.first.error:
        known = find_correction(run_checkpoints(run), run_validations(run), best.metric)
        if known is not None:
            lines.append(f"  corrected   {best.first.value - known.shared:.4f}: {known}")
    if best.runner_up is None:
        return "\n".join([*lines, "  no other checkpoint has a value"])
    tie = " (as good; among equal values the earliest is best)" if best.is_tied else ""
    lines.append(f"  runner-up   {best.runner_up}{tie}")
    ahead = f"  difference  {best.first.value - best.runner_up.value:+.4f}"
    try:
        change = against_runner_up(run, best, seed)
    except NoValuesError as error:
        return "\n".join([*lines, ahead, f"  no test: {error}"])
    if change is not None:
        ahead += f" over {change.queries} queries, {change}"
    return "\n".join([*lines, ahead])
