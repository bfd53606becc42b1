"""Results of validations: recorded once per checkpoint, then written as metrics.

The record is a write-once parameter of the LoggedModel, and the server refuses a second one. The
metrics are written from the record, with the checkpoint's own timestamp. Writing them again changes
nothing, so each metric has exactly one point, even if a validator was killed at any moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from enum import Enum

from mlflow.entities import Metric

from mlflow_dr.errors import TrackingError
from mlflow_dr.terminal import one_line_of
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id
from mlflow_dr.tracking.client import tracking_errors, write_once
from mlflow_dr.tracking.runs import TrackedRun

PREFIX = "mlflow_dr.validation."
LONGEST_TAG = 5000
TIMING = "timing/"
TIMINGS = frozenset(("seconds", "lag_seconds", "passages_per_second", "questions_per_second"))
"""Figures of a record that are no measures of retrieval."""


class State(Enum):
    """The state of a validation of a checkpoint."""

    OPEN = "open"
    RECORDED = "recorded"
    DONE = "done"
    FAILED = "failed"


def validation_state(checkpoint: Checkpoint, name: str) -> State:
    """The state of the validation `name` of a checkpoint."""
    record = checkpoint.params.get(PREFIX + name)
    if record is not None:
        values = parse_record(record)
        if values is None:  # a record cannot be replaced
            return State.FAILED
        written = {metric_name(name, key) for key in values}
        return State.DONE if written <= checkpoint.metrics else State.RECORDED
    if f"{PREFIX}{name}.failed" in checkpoint.tags:
        return State.FAILED
    return State.OPEN


def metric_name(validation: str, key: str) -> str:
    """The metric of a figure in a record: `val/mrr_at_10`, `timing/val/seconds`.

    MLflow shows the metrics of one prefix together, so measures and timings have different ones.
    """
    return f"{TIMING if key in TIMINGS else ''}{validation}/{key}"


def is_finished(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the validation `name` of a checkpoint is done or has failed."""
    return validation_state(checkpoint, name) in (State.DONE, State.FAILED)


def has_record(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a validation of a checkpoint has a record, even a malformed one."""
    return PREFIX + name in checkpoint.params


def failure_reason(checkpoint: Checkpoint, name: str) -> str:
    """Why a validation of a checkpoint has failed; empty if it has not."""
    record = checkpoint.params.get(PREFIX + name)
    if record is not None and parse_record(record) is None:
        return f"its param {PREFIX}{name} is not a record of metrics: {record!r:.80}"
    return checkpoint.tags.get(f"{PREFIX}{name}.failed", "")


def parse_record(record: str) -> dict[str, float] | None:
    """The values of a record, by metric name without prefix; None if it is malformed."""
    try:
        values = json.loads(record)["values"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return values if all(type(value) in (int, float) for value in values.values()) else None


def record_result(
    run: TrackedRun,
    checkpoint: Checkpoint,
    name: str,
    values: Mapping[str, float],
    dataset: tuple[str, str],
    now_ms: int | None = None,
) -> dict[str, float]:
    """Record a result, unless there is a record, and write what is recorded as metrics.

    Args:
        run: of the checkpoint.
        checkpoint: the validated one.
        name: of the validation, which prefixes the metrics.
        values: by metric name without prefix. `lag_seconds`, from READY until now, is added.
        dataset: name and digest of the collection.
        now_ms: the server's time, in ms since 1970; this machine's when None.

    Returns:
        The recorded values; those of another validator if it was first.
    """
    now_ms = now_ms or time.time_ns() // 1_000_000
    lag = max(0, now_ms - checkpoint.ready_ms) / 1000
    record = json.dumps({"values": {**values, "lag_seconds": lag}, "written_ms": now_ms})
    with tracking_errors(f"recording step {checkpoint.step}"):
        try:
            write_once(run.client, checkpoint.model_id, PREFIX + name, record)
        except Exception:
            # there is a record already, or the answer to our own write was lost: read it back
            stored = checkpoint_by_id(run.client, checkpoint.model_id).params.get(PREFIX + name)
            if stored is None:
                raise
            record = stored
    return _write_metrics(run, checkpoint, name, record, dataset)


def write_recorded(
    run: TrackedRun, checkpoint: Checkpoint, name: str, dataset: tuple[str, str]
) -> dict[str, float]:
    """Write the metrics of a record whose validator was killed before it wrote them."""
    return _write_metrics(run, checkpoint, name, checkpoint.params[PREFIX + name], dataset)


def mark_failed(run: TrackedRun, checkpoint: Checkpoint, name: str, reason: str) -> None:
    """Record on the checkpoint why it could not be validated."""
    with tracking_errors(f"marking step {checkpoint.step} as failed"):
        run.client.set_logged_model_tags(
            checkpoint.model_id, {f"{PREFIX}{name}.failed": one_line_of(reason, LONGEST_TAG)}
        )


def _write_metrics(
    run: TrackedRun, checkpoint: Checkpoint, name: str, record: str, dataset: tuple[str, str]
) -> dict[str, float]:
    values = parse_record(record)
    if values is None:
        raise TrackingError(
            f"step {checkpoint.step}: param {PREFIX}{name} of {checkpoint.uri} is not a record of "
            f"metrics: {record!r:.80}"
        )
    metrics = [
        Metric(
            metric_name(name, key),
            value,
            checkpoint.created_ms,
            checkpoint.step,
            model_id=checkpoint.model_id,
            dataset_name=dataset[0],
            dataset_digest=dataset[1],
            run_id=run.id,
        )
        for key, value in values.items()
    ]
    with tracking_errors(f"logging the metrics of step {checkpoint.step}"):
        run.client.log_batch(run.id, metrics=metrics)
    return values
