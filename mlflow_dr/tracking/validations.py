"""The validations of a run: their configurations, their steps, and the metric that decides."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import PREFIX, parse_record
from mlflow_dr.tracking.runs import TrackedRun

EVERY = ".every"
CONTEXT_TAG = "mlflow.data.context"
STEP_OF_SUBSET = re.compile(r"\bencoder:step-([0-9]{1,18})@")
MAIN_PARAM = "mlflow_dr.main_validation"  # of a run: the validation that decides by default
FIRST_NAME = "val"  # default name of a validation


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

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that higher is better: 1 or -1."""
        return sign_of(self.key)


LOWER_IS_BETTER = ("average_rank", "nll")


def sign_of(measure: str) -> int:
    """1 for a measure that should rise, -1 for one that should fall."""
    return -1 if measure.startswith(LOWER_IS_BETTER) else 1


def parse_config(text: str) -> dict[str, object] | None:
    """The configuration in a param of a run; None if the param is malformed."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def bind_name(run: TrackedRun, name: str, config: Mapping[str, object]) -> dict[str, object]:
    """Bind a validation's name to its configuration on this run; the first validator decides.

    Args:
        run: of the validation.
        name: of the validation, which prefixes its metrics.
        config: everything that its metrics depend on.

    Returns:
        The configuration that the name is bound to: this one, or an earlier one.

    Raises:
        UsageError: the name was bound before, to something malformed.
        TrackingError: the server does not answer.
    """
    text = run.set_param_once(f"{PREFIX}{name}", json.dumps(config, sort_keys=True))
    bound = parse_config(text)
    if bound is None:
        raise UsageError(
            f"run {run.id}: param {PREFIX}{name} is not the configuration of a validation: "
            f"{text!r:.80}; choose another --name for this validation"
        )
    return bound


def check_same_config(
    run: TrackedRun, name: str, known: Mapping[str, object], wanted: Mapping[str, object]
) -> None:
    """Refuse a name that is bound to another configuration; the two curves would mix.

    Raises:
        UsageError: both configurations.
    """
    if known != wanted:
        raise UsageError(
            f"validation {name!r} of run {run.id} has another configuration: "
            f"{config_differences(known, wanted)}; choose another --name"
        )


def config_differences(known: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """How two configurations differ, such as `measures is 'mrr@10', not 'ndcg@10'`."""
    keys = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    return ", ".join(f"{key} is {_shown(known, key)}, not {_shown(wanted, key)}" for key in keys)


def _shown(config: Mapping[str, object], key: str) -> str:
    return repr(config[key]) if key in config else "not given"


def run_validations(run: TrackedRun) -> dict[str, dict[str, object]]:
    """The configuration that each validation's name is bound to on a run, by name.

    Malformed params are skipped.

    Raises:
        TrackingError: the server does not answer.
    """
    return _configs(run.fetch().data.params)


def _configs(params: Mapping[str, str]) -> dict[str, dict[str, object]]:
    return {
        key.removeprefix(PREFIX): config
        for key, value in sorted(params.items())
        if key.startswith(PREFIX) and (config := parse_config(value)) is not None
    }


def subset_encoder_steps(configs: Mapping[str, Mapping[str, object]]) -> dict[int, str]:
    """Steps of a run's checkpoints by which subsets are chosen -> the validation of the subset.

    Args:
        configs: as `run_validations` gives them.
    """
    return {
        int(step): name
        for name, config in configs.items()
        for step in STEP_OF_SUBSET.findall(str(config.get("subset", "")))
    }


def recorded_values(checkpoint: Checkpoint, name: str) -> dict[str, float]:
    """The recorded values of a validation, by metric name without prefix; empty if none are."""
    record = checkpoint.params.get(PREFIX + name)
    return (parse_record(record) or {}) if record else {}


def metric_value(checkpoint: Checkpoint, metric: Metric) -> float | None:
    """The recorded value of a metric; None if there is none."""
    value = recorded_values(checkpoint, metric.validation).get(metric.key)
    return None if value is None else float(value)


def metric_error(checkpoint: Checkpoint, metric: Metric) -> float:
    """Half the width of the 95 % interval of a value that is an estimate; 0 of a measured one."""
    values = recorded_values(checkpoint, metric.validation)
    ends = [values.get(f"{metric.key}/{end}") for end in ("low", "high")]
    return 0.0 if ends[0] is None or ends[1] is None else (ends[1] - ends[0]) / 2


def metric_points(checkpoints: Iterable[Checkpoint], metric: Metric) -> list[tuple[int, float]]:
    """Step and value of each checkpoint that has one."""
    return [
        (checkpoint.step, value)
        for checkpoint in checkpoints
        if (value := metric_value(checkpoint, metric)) is not None
    ]


def chosen_metric(run: TrackedRun, asked: str | None = None) -> Metric:
    """The metric that decides: higher is better.

    Args:
        run: whose.
        asked: `NAME/MEASURE`, or a measure of the run's main validation; its first measure when
            None. `mrr@10` stands for `mrr_at_10`. The main validation is the one that was begun
            first, according to a param of the run; else `val`, else the first by name.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: it has no validation yet, or the server does not answer.
    """
    params = run.fetch().data.params
    by_validation = {
        name: [Metric(name, key) for key in measures.replace("@", "_at_").split()]
        for name, config in _configs(params).items()
        if (measures := str(config.get("measures", "")).strip())
    }
    if not by_validation:
        raise TrackingError(
            f"run {run.id} has no validation yet; `mlflow-dr validate --run-id {run.id}` starts one"
        )
    named = (params.get(MAIN_PARAM), FIRST_NAME)
    first = next((name for name in named if name in by_validation), min(by_validation))
    if asked is None:
        return by_validation[first][0]
    name, slash, key = asked.rpartition("/")
    wanted = Metric(name if slash else first, key.replace("@", "_at_"))
    if wanted not in by_validation.get(wanted.validation, []):
        metrics = ", ".join(
            str(metric) for name in sorted(by_validation) for metric in by_validation[name]
        )
        raise UsageError(f"run {run.id} has no metric {asked!r} to choose by; it has: {metrics}")
    return wanted


def tag_validation_steps(run: TrackedRun, every: Mapping[str, int]) -> None:
    """Tag a run with the steps that validations take; of several validators' steps all count.

    Args:
        run: as it was fetched a moment ago.
        every: validation -> it takes the steps that are multiples of this; 0 if it chooses them.

    Raises:
        TrackingError: the server does not answer.
    """
    earlier = _steps(run.seen.data.tags)
    wanted = {name: math.gcd(earlier.get(name, 0), number) for name, number in every.items()}
    run.set_tags(
        {
            f"{PREFIX}{name}{EVERY}": str(number)
            for name, number in wanted.items()
            if earlier.get(name) != number
        }
    )


def validation_steps(run: TrackedRun) -> dict[str, int]:
    """Validation -> it takes the steps that are multiples of this number; 0 if it chooses them.

    A validation that is missing here takes every step.

    Raises:
        TrackingError: the server does not answer.
    """
    return _steps(run.fetch().data.tags)


def _steps(tags: Mapping[str, str]) -> dict[str, int]:
    return {
        key.removeprefix(PREFIX).removesuffix(EVERY): int(value)
        for key, value in tags.items()
        if key.startswith(PREFIX) and key.endswith(EVERY) and value.isdecimal()
    }


def validation_collection(run: TrackedRun, name: str) -> str | None:
    """The collection of a validation, as `open_collection` takes it; None if the run has none.

    Raises:
        TrackingError: the server does not answer.
    """
    inputs = run.fetch().inputs
    for entry in inputs.dataset_inputs if inputs else ():
        if {tag.key: tag.value for tag in entry.tags}.get(CONTEXT_TAG) == f"validation {name}":
            collection = (parse_config(entry.dataset.source) or {}).get("collection")
            return collection if isinstance(collection, str) else None
    return None
