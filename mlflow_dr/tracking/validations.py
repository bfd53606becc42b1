"""What is said on a run of its validations, and on its checkpoints of their figures."""

from __future__ import annotations

import json

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.results import PREFIX
from mlflow_dr.tracking.runs import TrackedRun

CONTEXT_TAG = "mlflow.data.context"


def validations_of(run: TrackedRun) -> dict[str, dict[str, object]]:
    """The configuration that each validation's name is bound to on a run, by name.

    Raises:
        TrackingError: the server does not answer.
    """
    params = run.fetch().data.params
    return {
        key.removeprefix(PREFIX): json.loads(value)
        for key, value in sorted(params.items())
        if key.startswith(PREFIX)
    }


def figures_of(checkpoint: Checkpoint, name: str) -> dict[str, float]:
    """The recorded figures of a validation, by metric name without prefix; none where none are."""
    record = checkpoint.params.get(PREFIX + name)
    return json.loads(record)["values"] if record else {}


def collection_of(run: TrackedRun, name: str) -> str | None:
    """The collection that a validation is on, as `open_collection` takes it, where the run says so.

    Raises:
        TrackingError: the server does not answer.
    """
    inputs = run.fetch().inputs
    for entry in inputs.dataset_inputs if inputs else ():
        if {tag.key: tag.value for tag in entry.tags}.get(CONTEXT_TAG) == f"validation {name}":
            known: str | None = json.loads(entry.dataset.source).get("collection")
            return known
    return None
