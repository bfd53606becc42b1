"""What is said on a run of its validations, and on its checkpoints of their figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import PREFIX, parse_config, parse_record
from mlflow_dr.tracking.runs import TrackedRun

CONTEXT_TAG = "mlflow.data.context"
STEP_OF_SUBSET = re.compile(r"\bencoder:step-([0-9]{1,18})@")
FIRST_NAME = "val"  # what a validation is called whose user has not called it anything


class Metric(NamedTuple):
    """A measure of a validation; its text is the metric's name, such as `val/mrr_at_10`.

    Attributes:
        validation: its name.
        key: the measure, as MLflow takes it.
    """

    validation: str
    key: str

    def __str__(self) -> str:
        return f"{self.validation}/{self.key}"


def validations_of(run: TrackedRun) -> dict[str, dict[str, object]]:
    """The configuration that each validation's name is bound to on a run, by name.

    Params that only look like one are passed over.

    Raises:
        TrackingError: the server does not answer.
    """
    params = run.fetch().data.params
    return {
        key.removeprefix(PREFIX): config
        for key, value in sorted(params.items())
        if key.startswith(PREFIX) and (config := parse_config(value)) is not None
    }


def steps_searched_with(configs: Mapping[str, Mapping[str, object]]) -> dict[int, str]:
    """Steps of a run's checkpoints by which subsets are chosen -> the validation of the subset.

    Args:
        configs: as `validations_of` gives them.
    """
    return {
        int(step): name
        for name, config in configs.items()
        for step in STEP_OF_SUBSET.findall(str(config.get("subset", "")))
    }


def figures_of(checkpoint: Checkpoint, name: str) -> dict[str, float]:
    """The recorded figures of a validation, by metric name without prefix; none where none are."""
    record = checkpoint.params.get(PREFIX + name)
    return (parse_record(record) or {}) if record else {}


def value_of(checkpoint: Checkpoint, metric: Metric) -> float | None:
    """The recorded value of a metric; None where its validation is not done, or had none."""
    value = figures_of(checkpoint, metric.validation).get(metric.key)
    return None if value is None else float(value)


def points_of(checkpoints: Iterable[Checkpoint], metric: Metric) -> list[tuple[int, float]]:
    """Step and value of each checkpoint that has one."""
    return [
        (one.step, value) for one in checkpoints if (value := value_of(one, metric)) is not None
    ]


def metrics_of(run: TrackedRun) -> dict[str, list[Metric]]:
    """What each validation that is bound to a run measures, the first measure first.

    Raises:
        TrackingError: the server does not answer.
    """
    return {
        name: [
            Metric(name, key)
            for key in str(config.get("measures", "")).replace("@", "_at_").split()
        ]
        for name, config in validations_of(run).items()
    }


def chosen_metric(run: TrackedRun, asked: str | None = None) -> Metric:
    """The metric that decides: higher is better.

    Args:
        run: whose.
        asked: `NAME/MEASURE`, or a measure of the first validation, which is `val` or else the
            first one by name; its first measure when None. `mrr@10` stands for `mrr_at_10`.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: it has no validation yet, or the server does not answer.
    """
    known = {name: keys for name, keys in metrics_of(run).items() if keys}
    if not known:
        raise TrackingError(
            f"run {run.id} has no validation yet; `mlflow-dr validate --run-id {run.id}` begins one"
        )
    first = FIRST_NAME if FIRST_NAME in known else min(known)
    if asked is None:
        return known[first][0]
    name, slash, key = asked.rpartition("/")
    wanted = Metric(name if slash else first, key.replace("@", "_at_"))
    if wanted not in known.get(wanted.validation, []):
        there = ", ".join(str(one) for name in sorted(known) for one in known[name])
        raise UsageError(f"run {run.id} has no metric {asked!r} to choose by; it has: {there}")
    return wanted


def collection_of(run: TrackedRun, name: str) -> str | None:
    """The collection that a validation is on, as `open_collection` takes it, where the run says so.

    Raises:
        TrackingError: the server does not answer.
    """
    inputs = run.fetch().inputs
    for entry in inputs.dataset_inputs if inputs else ():
        if {tag.key: tag.value for tag in entry.tags}.get(CONTEXT_TAG) == f"validation {name}":
            known = (parse_config(entry.dataset.source) or {}).get("collection")
            return known if isinstance(known, str) else None
    return None
