"""What is said on a run of its validations, and on its checkpoints of their figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import PREFIX, parse_config, parse_record
from mlflow_dr.tracking.runs import TrackedRun

EVERY = ".every"
CONTEXT_TAG = "mlflow.data.context"
STEP_OF_SUBSET = re.compile(r"\bencoder:step-([0-9]{1,18})@")
MAIN_PARAM = "mlflow_dr.main_validation"  # of a run: which validation decides, if nothing is said
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
        asked: `NAME/MEASURE`, or a measure of the run's main validation, which is the one that was
            begun first; its first measure when None. `mrr@10` stands for `mrr_at_10`.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: it has no validation yet, or the server does not answer.
    """
    known = {name: keys for name, keys in metrics_of(run).items() if keys}
    if not known:
        raise TrackingError(
            f"run {run.id} has no validation yet; `mlflow-dr validate --run-id {run.id}` begins one"
        )
    first = main_validation(run, known)
    if asked is None:
        return known[first][0]
    name, slash, key = asked.rpartition("/")
    wanted = Metric(name if slash else first, key.replace("@", "_at_"))
    if wanted not in known.get(wanted.validation, []):
        there = ", ".join(str(one) for name in sorted(known) for one in known[name])
        raise UsageError(f"run {run.id} has no metric {asked!r} to choose by; it has: {there}")
    return wanted


def main_validation(run: TrackedRun, names: Iterable[str]) -> str:
    """Which validation decides about a run's checkpoints where the user names none.

    The one that was begun first, as every validator notes it; else `val`, else the first by name.

    Args:
        run: whose.
        names: the validations that it has, one at least.

    Raises:
        TrackingError: the server does not answer.
    """
    names = list(names)
    noted = run.fetch().data.params.get(MAIN_PARAM)
    return next((one for one in (noted, FIRST_NAME) if one in names), min(names))


def note_steps(run: TrackedRun, every: Mapping[str, int]) -> None:
    """Note which steps validations are done of; of what several validators say, the most counts.

    Args:
        run: which.
        every: validation -> it takes the steps that this divides; 0 where it chooses them itself.

    Raises:
        TrackingError: the server does not answer.
    """
    known = steps_taken(run)
    wanted = {name: math.gcd(known.get(name, 0), number) for name, number in every.items()}
    run.set_tags(
        {
            f"{PREFIX}{name}{EVERY}": str(number)
            for name, number in wanted.items()
            if known.get(name) != number
        }
    )


def steps_taken(run: TrackedRun) -> dict[str, int]:
    """Validation -> it is done of the steps that this divides; 0: of those that it chooses.

    A validation that is not in it is done of every step.

    Raises:
        TrackingError: the server does not answer.
    """
    return {
        key.removeprefix(PREFIX).removesuffix(EVERY): int(value)
        for key, value in run.fetch().data.tags.items()
        if key.startswith(PREFIX) and key.endswith(EVERY) and value.isdecimal()
    }


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
