"""Checkpoints in MLflow's model registry."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id
from mlflow_dr.tracking.client import all_pages, tracking_errors
from mlflow_dr.tracking.descriptions import BEST_VALUE
from mlflow_dr.tracking.runs import TrackedRun

BEST_ALIAS = "best"
MODEL_ID = re.compile(r"\bm-[0-9a-f]{32}\b")


def checkpoint_by_uri(client: MlflowClient, uri: str) -> Checkpoint:
    """The checkpoint behind `models:/<id>`, or a version of a registered model.

    Args:
        client: of the tracking server.
        uri: `models:/<id>`, `models:/NAME/VERSION`, `models:/NAME/latest` or `models:/NAME@ALIAS`.

    Raises:
        UsageError: the version is not of a checkpoint.
        TrackingError: no such model, or the server does not answer.
    """
    name = uri.removeprefix("models:/")
    if not {"/", "@"} & set(name):
        return checkpoint_by_id(client, name)
    with tracking_errors(uri):
        version = client.get_model_version(*get_model_name_and_version(client, uri))
    # databases store only the source (MLflow 3.17): a model's URI, or its location
    model_id = version.model_id or next(iter(MODEL_ID.findall(version.source or "")), None)
    if not model_id:
        raise UsageError(
            f"{uri} is not a published checkpoint; it was registered from {version.source}"
        )
    return checkpoint_by_id(client, model_id)


def register(run: TrackedRun, checkpoint: Checkpoint, name: str) -> str:
    """Register a checkpoint as a version of a model, and let the alias `best` point to it.

    A checkpoint that already has a version gets no second one.

    Args:
        run: the run that the checkpoint belongs to.
        checkpoint: published with its files.
        name: of the registered model, which is created if it is new.

    Returns:
        The version.

    Raises:
        UsageError: MLflow does not have the checkpoint's files.
        TrackingError: the server did not take it, or allows no such name.
    """
    if checkpoint.directory or checkpoint.is_pruned:
        why = f"they lie in {checkpoint.directory}" if checkpoint.directory else "were deleted"
        raise UsageError(
            f"{checkpoint.uri} cannot be registered: MLflow does not have its files ({why})"
        )
    with tracking_errors(f"registering {checkpoint.uri} as {name!r}"):
        _make_model(run.client, name)
        version = _version_of(run.client, checkpoint, name)
        if version is None:
            version = run.client.create_model_version(
                name, checkpoint.uri, run.id, model_id=checkpoint.model_id
            )
        run.client.set_registered_model_alias(name, BEST_ALIAS, version.version)
    return str(version.version)


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: MlflowClient, checkpoint: Checkpoint, name: str) -> ModelVersion | None:
    quote = '"' if "'" in name else "'"
    sources = (checkpoint.uri, checkpoint.location.rstrip("/"))
    for version in all_pages(client.search_model_versions, f"name={quote}{name}{quote}"):
        # databases store only the source (MLflow 3.17): a model's URI, or its location
        if checkpoint.model_id == version.model_id or (version.source or "").rstrip("/") in sources:
            return version
    return None


BEST_TAG = "mlflow_dr.best."


def tag_best(
    run: TrackedRun, name: str, best: Checkpoint, metric: str, value: float, interval: str
) -> None:
    """Tag a run's best checkpoint by a validation, and the run with its name and its value.

    Args:
        name: of the validation.
        best: the best checkpoint.
        metric: the metric that it is best by.
        value: its value of the metric.
        interval: of the value, in words; empty if it is not known.

    Raises:
        TrackingError: the server did not take it.
    """
    shown = f"{value:.6g}"
    with tracking_errors(f"tagging step {best.step} as best"):
        run.client.set_logged_model_tags(best.model_id, {BEST_TAG + name: shown})
    about = f" ({interval})" if interval else ""
    run.set_tags(
        {
            BEST_TAG + name: f"step {best.step}, {best.uri}, {metric} {shown}",
            f"{BEST_VALUE}{metric}": f"{value:.4f} at step {best.step}{about}",
        }
    )


def untag_best(run: TrackedRun, name: str, checkpoints: Iterable[Checkpoint]) -> None:
    """Remove the tag from checkpoints that were the best before.

    Raises:
        TrackingError: the server did not take it.
    """
    for checkpoint in checkpoints:
        with tracking_errors(f"untagging step {checkpoint.step}"):
            try:
                run.client.delete_logged_model_tag(checkpoint.model_id, BEST_TAG + name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another validator did it
                    raise
