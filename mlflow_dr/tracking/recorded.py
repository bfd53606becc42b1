"""What validations have recorded on checkpoints, and which figure of theirs decides."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import PREFIX
from mlflow_dr.tracking.runs import TrackedRun

DEFAULT_VALIDATION = "val"


class MetricKey(NamedTuple):
    """A measure of a validation; its text is the metric's name, such as `val/mrr_at_10`.

    Attributes:
        validation: its name.
        key: the measure, as MLflow takes it.
    """

    validation: str
    key: str

    def __str__(self) -> str:
        return f"{self.validation}/{self.key}"


def metrics_of(run: TrackedRun) -> dict[str, list[MetricKey]]:
    """What each validation that is bound to a run measures, the first measure first.

    Raises:
        TrackingError: the server does not answer.
    """
    found: dict[str, list[MetricKey]] = {}
    for param, value in run.fetch().data.params.items():
        if param.startswith(PREFIX):
            name = param.removeprefix(PREFIX)
            measures = str(json.loads(value).get("measures", "")).replace("@", "_at_").split()
            found[name] = [MetricKey(name, key) for key in measures]
    return found


def chosen_metric(run: TrackedRun, asked: str | None = None) -> MetricKey:
    """The metric that decides: higher is better.

    Args:
        run: whose.
        asked: `NAME/MEASURE`, or a measure of the default validation, which is `val` or else the
            first one by name; its first measure when None. `mrr@10` stands for `mrr_at_10`.

    Raises:
        UsageError: nothing is bound to the run, or not that.
        TrackingError: the server does not answer.
    """
    known = {name: keys for name, keys in metrics_of(run).items() if keys}
    if not known:
        raise UsageError(f"run {run.id} has no validation yet, so no checkpoint is the best")
    default = DEFAULT_VALIDATION if DEFAULT_VALIDATION in known else min(known)
    if asked is None:
        return known[default][0]
    name, slash, key = asked.rpartition("/")
    wanted = MetricKey(name if slash else default, key.replace("@", "_at_"))
    if wanted not in known.get(wanted.validation, []):
        there = ", ".join(str(one) for name in sorted(known) for one in known[name])
        raise UsageError(f"run {run.id} has no metric {asked!r} to choose by; there are {there}")
    return wanted


def value_of(checkpoint: Checkpoint, metric: MetricKey) -> float | None:
    """The recorded value of a metric; None where its validation is not done, or had none."""
    record = checkpoint.params.get(PREFIX + metric.validation)
    if record is None:
        return None
    value = json.loads(record)["values"].get(metric.key)
    return None if value is None else float(value)


def points_of(checkpoints: Iterable[Checkpoint], metric: MetricKey) -> list[tuple[int, float]]:
    """Step and value of each checkpoint that has one."""
    return [
        (one.step, value) for one in checkpoints if (value := value_of(one, metric)) is not None
    ]
