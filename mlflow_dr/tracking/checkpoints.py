"""Checkpoints in MLflow: one LoggedModel each, READY when its upload is complete."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.files import grant_umask_modes
from mlflow_dr.tracking.client import all_pages, tracking_errors
from mlflow_dr.tracking.manifest import verify_upload, write_manifest
from mlflow_dr.tracking.mlmodel import is_reader, write_mlmodel
from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

STEP_TAG = "mlflow_dr.step"
DIRECTORY_TAG = "mlflow_dr.directory"
MANIFEST_TAG = "mlflow_dr.manifest_sha256"
PRUNED_TAG = "mlflow_dr.pruned"
BEGUN, TAKEN_BACK = "begun", "taken back"
MODEL_TYPE, READER_TYPE = "dense_retriever", "reader"
READY = LoggedModelStatus.READY
PER_REQUEST = 1000
STEP = re.compile(r"[0-9]{1,18}")  # a metric's step has 64 bits
NEAREST = 4  # steps that are named where one is missing


@dataclass(frozen=True)
class Checkpoint:
    """A published encoder or reader, as the tracking server shows it.

    Attributes:
        model_id: MLflow's id of the LoggedModel.
        run_id: the run that it was published by.
        step: training step of the weights.
        ready: whether the upload is complete.
        pending: whether it was only announced so far; it stays so if its trainer was killed.
        created_ms: when it was created, in ms since 1970; the timestamp of its metrics.
        ready_ms: when it became READY, in ms since 1970.
        location: artifact URI.
        manifest: SHA-256 of the manifest.
        params: write-once parameters of the LoggedModel.
        tags: its tags.
        metrics: names of the metrics it has.
        directory: of a checkpoint that was not published but found; a path on that machine.
        model_type: `MODEL_TYPE` of encoders or `READER_TYPE`.
    """

    model_id: str
    run_id: str
    step: int
    ready: bool
    pending: bool
    created_ms: int
    ready_ms: int
    location: str
    manifest: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: frozenset[str]
    directory: str = ""
    model_type: str = MODEL_TYPE

    @property
    def uri(self) -> str:
        """`models:/<id>`."""
        return f"models:/{self.model_id}"

    @property
    def is_pruned(self) -> bool:
        """Whether its files were deleted, or are being deleted."""
        return self.tags.get(PRUNED_TAG, TAKEN_BACK) != TAKEN_BACK

    @property
    def is_fully_pruned(self) -> bool:
        """Whether all of its files were deleted."""
        return self.is_pruned and self.tags[PRUNED_TAG] != BEGUN

    @property
    def has_all_files(self) -> bool:
        """Whether its upload was completed and no file was deleted since."""
        return self.ready and not self.is_pruned


def prepare_upload(directory: Path) -> str:
    """Add MLflow's description and the manifest to a checkpoint's directory.

    Returns:
        The SHA-256 of the manifest, which `announce_checkpoint` takes.
    """
    write_mlmodel(directory)
    grant_umask_modes(directory)
    return write_manifest(directory)


def model_type_of(directory: Path) -> str:
    """What MLflow shows as the type of a checkpoint's model."""
    return READER_TYPE if is_reader(directory) else MODEL_TYPE


def announce_checkpoint(
    run: TrackedRun, step: int, manifest: str, model_type: str = MODEL_TYPE
) -> str:
    """Announce a checkpoint (PENDING); returns its model id."""
    model = run.client.create_logged_model(
        run.experiment_id,
        name=f"step-{step}",
        source_run_id=run.id,
        tags={STEP_TAG: str(step), MANIFEST_TAG: manifest},
        model_type=model_type,
    )
    return str(model.model_id)


def upload_checkpoint(run: TrackedRun, model_id: str, directory: Path, step: int) -> None:
    """Upload an announced checkpoint and declare it READY, which comes last.

    After a failure it can be called again for the same id.

    Raises:
        TrackingError: the store does not list what was uploaded.
        Exception: as MLflow and the store raise it.
    """
    run.client.log_model_artifacts(model_id, str(directory))
    verify_upload(directory, partial(run.client.list_logged_model_artifacts, model_id))
    link_to_run(run, model_id, step)
    run.client.finalize_logged_model(model_id, READY)


def link_to_run(run: TrackedRun, model_id: str, step: int) -> None:
    """Make a checkpoint an output of the run at its step; MLflow accepts this only once."""
    try:
        run.client.log_outputs(run.id, [LoggedModelOutput(model_id, step)])
    except Exception:
        outputs = run.fetch().outputs
        if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
            raise


def publish(run: TrackedRun, directory: Path, step: int) -> str:
    """Publish an encoder's directory as the checkpoint of a training step.

    Raises:
        TrackingError: the server did not take it.
    """
    with tracking_errors(f"publishing step {step}"):
        manifest = prepare_upload(directory)
        model_id = announce_checkpoint(run, step, manifest, model_type_of(directory))
        upload_checkpoint(run, model_id, directory, step)
    return model_id


def mark_upload_failed(run: TrackedRun, model_id: str) -> None:
    """Declare an announced checkpoint FAILED."""
    run.client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)


def run_checkpoints(run: TrackedRun) -> list[Checkpoint]:
    """All checkpoints of a run, by step; other models of the run are skipped."""
    return find_checkpoints(run.client, run.experiment_id, run.id)


def find_checkpoints(
    client: MlflowClient, experiment_id: str, run_id: str | None = None, since_ms: int = 0
) -> list[Checkpoint]:
    """Checkpoints of an experiment, by step; one request for each 1,000.

    A checkpoint whose step is malformed is skipped with a warning.

    Args:
        run_id: of this run only.
        since_ms: created then or later, in ms since 1970.

    Raises:
        TrackingError: the server does not answer.
    """
    # a status in the filter string silently finds nothing (MLflow 3.17)
    conditions = [f"source_run_id = '{run_id}'"] if run_id else []
    conditions += [f"creation_timestamp >= {since_ms}"] if since_ms else []
    with tracking_errors(f"checkpoints of {run_id or f'experiment {experiment_id}'}"):
        models = all_pages(
            client.search_logged_models,
            [experiment_id],
            filter_string=" AND ".join(conditions) or None,
            max_results=PER_REQUEST,
        )
        checkpoints = [_checkpoint(model) for model in models if _is_checkpoint(model)]
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.created_ms))


def ready_steps(run: TrackedRun) -> set[int]:
    """The training steps whose checkpoint is READY.

    Raises:
        TrackingError: the server does not answer.
    """
    return {checkpoint.step for checkpoint in run_checkpoints(run) if checkpoint.ready}


def fail_pending_checkpoints(run: TrackedRun) -> list[int]:
    """Declare FAILED the checkpoints that a killed trainer announced and did not upload.

    Call it when a run is resumed, before anything is published. It would also fail the current
    upload of a trainer that is alive.

    Returns:
        The steps, ascending.

    Raises:
        TrackingError: the server does not answer.
    """
    pending = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.pending]
    with tracking_errors(f"marking the unfinished uploads of run {run.id} as failed"):
        for checkpoint in pending:
            mark_upload_failed(run, checkpoint.model_id)
    return [checkpoint.step for checkpoint in pending]


def checkpoint_by_id(client: MlflowClient, model_id: str) -> Checkpoint:
    """The checkpoint behind `models:/<id>`.

    Raises:
        TrackingError: no such model, or its step is malformed.
    """
    with tracking_errors(f"model {model_id}"):
        model = client.get_logged_model(model_id)
        step = (model.tags or {}).get(STEP_TAG, "0")
        if not STEP.fullmatch(step):
            raise TrackingError(f"model {model_id}: tag {STEP_TAG} is not a step: {step!r:.80}")
        return _checkpoint(model)


def is_deleted(client: MlflowClient, model_id: str) -> bool:
    """Whether a checkpoint does not exist, or was deleted; False if the server does not answer."""
    try:
        client.get_logged_model(model_id)
    except Exception as error:  # noqa: BLE001 - a broken answer fails in many ways
        return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
    return False


def checkpoint_of_step(run: TrackedRun, step: int) -> Checkpoint:
    """The READY checkpoint of a training step; the first one if there are several.

    Raises:
        UsageError: no such checkpoint is published.
        TrackingError: the server does not answer.
    """
    ready = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready]
    for checkpoint in ready:
        if checkpoint.step == step:
            return checkpoint
    steps = {checkpoint.step for checkpoint in ready}
    near = sorted(sorted(steps, key=lambda other: abs(other - step))[:NEAREST])
    raise UsageError(
        f"run {run.id} has no published checkpoint of step {step}; "
        + (f"the nearest steps are {', '.join(map(str, near))}" if near else "it has none at all")
    )


def _is_checkpoint(model: LoggedModel) -> bool:
    """Whether a model is tagged with a training step."""
    step = (model.tags or {}).get(STEP_TAG)
    if step is not None and not STEP.fullmatch(step):
        _warn_of_step(str(model.model_id), step[:80])
        return False
    return step is not None


@cache
def _warn_of_step(model_id: str, step: str) -> None:
    """Warn once of each model whose tag is not a step."""
    log.warning("model %s is skipped: its tag %s is not a step: %r", model_id, STEP_TAG, step)


def _checkpoint(model: LoggedModel) -> Checkpoint:
    tags = model.tags or {}
    return Checkpoint(
        model_id=str(model.model_id),
        run_id=str(model.source_run_id or ""),
        step=int(tags.get(STEP_TAG, "0")),
        ready=model.status == READY,
        pending=model.status == LoggedModelStatus.PENDING,
        created_ms=model.creation_timestamp or 0,
        ready_ms=model.last_updated_timestamp or 0,
        location=model.artifact_location or "",
        manifest=tags.get(MANIFEST_TAG, ""),
        params=model.params or {},
        tags=tags,
        metrics=frozenset(metric.key for metric in model.metrics or ()),
        directory=tags.get(DIRECTORY_TAG, ""),
        model_type=model.model_type or MODEL_TYPE,
    )
