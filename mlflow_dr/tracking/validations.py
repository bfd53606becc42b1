"""What is said on a run of its validations, and on its checkpoints of their figures."""

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


def parse_config(text: str) -> dict[str, object] | None:
    """The configuration that a param of a run holds; None where it holds none."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def bind_name(run: TrackedRun, name: str, config: Mapping[str, object]) -> dict[str, object]:
    """Bind a validation's name to its configuration on this run; who is first decides.

    Args:
        run: the run.
        name: the validation's name, which prefixes its metrics.
        config: what its figures depend on.

    Returns:
        The configuration that the name stands for: this one, or one that was there before.

    Raises:
        UsageError: what was there before is no configuration.
        TrackingError: the server does not answer.
    """
    return _config(
        run, name, run.set_param_once(f"{PREFIX}{name}", json.dumps(config, sort_keys=True))
    )


def check_same_config(
    run: TrackedRun, name: str, known: Mapping[str, object], wanted: Mapping[str, object]
) -> None:
    """Refuse a name that stands for another configuration, whose curve would mix with this one.

    Raises:
        UsageError: both configurations.
    """
    if known != wanted:
        raise UsageError(
            f"validation {name!r} of run {run.id} has another configuration: "
            f"{config_differences(known, wanted)}; give this one another --name"
        )


def config_differences(known: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Where two configurations differ, in words: `measures is 'mrr@10', not 'ndcg@10'`."""
    keys = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    return ", ".join(f"{key} is {_said(known, key)}, not {_said(wanted, key)}" for key in keys)


def _said(config: Mapping[str, object], key: str) -> str:
    return repr(config[key]) if key in config else "not given"


def stored_config(run: TrackedRun, name: str) -> dict[str, object] | None:
    """The configuration that a validation's name is bound to on this run, if any.

    Raises:
        UsageError: it is bound to something that is no configuration.
        TrackingError: the server does not answer.
    """
    known = run.fetch().data.params.get(f"{PREFIX}{name}")
    return _config(run, name, known) if known else None


def _config(run: TrackedRun, name: str, text: str) -> dict[str, object]:
    config = parse_config(text)
    if config is None:
        raise UsageError(
            f"run {run.id}: param {PREFIX}{name} is no configuration of a validation: "
            f"{text!r:.80}; give this validation another --name"
        )
    return config


def run_validations(run: TrackedRun) -> dict[str, dict[str, object]]:
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
    """The recorded figures of a validation, by metric name without prefix; none where none are."""
    record = checkpoint.params.get(PREFIX + name)
    return (parse_record(record) or {}) if record else {}


def metric_value(checkpoint: Checkpoint, metric: Metric) -> float | None:
    """The recorded value of a metric; None where its validation is not done, or had none."""
    value = recorded_values(checkpoint, metric.validation).get(metric.key)
    return None if value is None else float(value)


def metric_points(checkpoints: Iterable[Checkpoint], metric: Metric) -> list[tuple[int, float]]:
    """Step and value of each checkpoint that has one."""
    return [
        (one.step, value) for one in checkpoints if (value := metric_value(one, metric)) is not None
    ]


def run_metrics(run: TrackedRun) -> dict[str, list[Metric]]:
    """What each validation that is bound to a run measures, the first measure first.

    Raises:
        TrackingError: the server does not answer.
    """
    return {
        name: [
            Metric(name, key)
            for key in str(config.get("measures", "")).replace("@", "_at_").split()
        ]
        for name, config in run_validations(run).items()
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
    known = {name: keys for name, keys in run_metrics(run).items() if keys}
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


def tag_validation_steps(run: TrackedRun, every: Mapping[str, int]) -> None:
    """Note which steps validations are done of; of what several validators say, the most counts.

    Args:
        run: which.
        every: validation -> it takes the steps that this divides; 0 where it chooses them itself.

    Raises:
        TrackingError: the server does not answer.
    """
    known = validation_steps(run)
    wanted = {name: math.gcd(known.get(name, 0), number) for name, number in every.items()}
    run.set_tags(
        {
            f"{PREFIX}{name}{EVERY}": str(number)
            for name, number in wanted.items()
            if known.get(name) != number
        }
    )


def validation_steps(run: TrackedRun) -> dict[str, int]:
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


def validation_collection(run: TrackedRun, name: str) -> str | None:
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
