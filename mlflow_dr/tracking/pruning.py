"""Deletes the files of a checkpoint in two steps; its entity, params and metrics stay.

A tag says first that the deletion has begun, and in the end when it was finished. So the next call
can finish an interrupted deletion, and validators know why there are no files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import (
    BEGUN,
    PER_REQUEST,
    PRUNED_TAG,
    TAKEN_BACK,
    Checkpoint,
    checkpoint_by_id,
    find_checkpoints,
)
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.client import all_pages, tracking_errors
from mlflow_dr.tracking.fetching import local_directory
from mlflow_dr.tracking.following import no_experiment
from mlflow_dr.tracking.registry import BEST_TAG
from mlflow_dr.tracking.results import PREFIX, State, validation_state

CLAIM = re.compile(rf"{re.escape(PREFIX)}(.+)\.claim\.\d+")
ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 0.5
VERSIONS_PER_REQUEST = 1000

Result = TypeVar("Result")


class RunState(Enum):
    """The state of a checkpoint's run: deleted ones can be restored, until `mlflow gc`."""

    ACTIVE = "active"
    DELETED = "deleted"
    GONE = "gone"


class Stored(NamedTuple):
    """The files of a checkpoint in the artifact store."""

    files: int
    bytes: int


class Deletion(NamedTuple):
    """The result of `delete_files`.

    Attributes:
        stored: what was deleted.
        kept: why nothing was deleted; empty otherwise.
        was_gone: whether the files had been deleted before.
    """

    stored: Stored = Stored(0, 0)
    kept: str = ""
    was_gone: bool = False


def keep_reason(checkpoint: Checkpoint, run: RunState = RunState.ACTIVE) -> str:
    """Why the files of a checkpoint must stay, whatever else is decided; empty if they may go.

    Args:
        checkpoint: as it is now.
        run: the state of its run. Of a deleted run the best checkpoint may go; of a run that is
            gone everything that lies in MLflow's store.
    """
    if checkpoint.directory:
        return f"found in {checkpoint.directory}"
    if run is RunState.GONE:
        return ""
    if checkpoint.pending:
        return "pending"
    for name in sorted({match[1] for key in checkpoint.params if (match := CLAIM.fullmatch(key))}):
        claim = latest_claim(checkpoint, name)
        if claim is None or claim.given_back or validation_state(checkpoint, name) is State.DONE:
            continue
        if claim.owner is None or not claim.owner.is_dead:
            return f"being validated by {claim.owner or 'an unknown validator'}"
    best = sorted(key.removeprefix(BEST_TAG) for key in checkpoint.tags if key.startswith(BEST_TAG))
    return f"tagged as best by {best[0]}" if best and run is RunState.ACTIVE else ""


def registered_versions(
    client: MlflowClient, checkpoints: Collection[Checkpoint]
) -> dict[str, str]:
    """Model id -> `registered as NAME version N`, of those that are versions of registered models.

    Raises:
        TrackingError: the server does not answer.
    """
    ids = {checkpoint.model_id for checkpoint in checkpoints}
    locations = {checkpoint.location.rstrip("/"): checkpoint.model_id for checkpoint in checkpoints}
    runs = {checkpoint.run_id for checkpoint in checkpoints}
    labels: dict[str, str] = {}
    with tracking_errors("looking for registered models"):
        for version in all_pages(client.search_model_versions, max_results=VERSIONS_PER_REQUEST):
            named = [part for part in re.split(r"[/\\]", version.source or "") if part in ids]
            if not named and version.run_id in runs:
                # a copy of another version names no model; its download location does
                uri = client.get_model_version_download_uri(version.name, version.version)
                model_id = locations.get(uri.rstrip("/"))
                named = [model_id] if model_id else []
            label = f"registered as {version.name} version {version.version}"
            labels |= dict.fromkeys(named, label)
    return labels


def stored_files(client: MlflowClient, checkpoint: Checkpoint) -> Stored:
    """How many files of a checkpoint the artifact store has, and their bytes.

    Raises:
        TrackingError: the store does not answer.
    """
    with tracking_errors(f"listing the files of step {checkpoint.step}"):
        return _count(_store(client, checkpoint))


def delete_files(
    client: MlflowClient, checkpoint: Checkpoint, run: RunState = RunState.ACTIVE
) -> Deletion:
    """Delete the files of a checkpoint, unless there is a reason to keep them by now.

    The tag is written before claims are read again. So a validator that claims the checkpoint in
    between is seen here, and one that claims it later sees the tag, or finds no files.

    Args:
        client: of the tracking server.
        checkpoint: as it was seen last.
        run: the state of its run.

    Raises:
        TrackingError: the server does not answer, the artifact store refuses, or the files do not
            lie in a directory of their own.
    """
    with tracking_errors(f"deleting the files of step {checkpoint.step} ({checkpoint.uri})"):
        now = checkpoint_by_id(client, checkpoint.model_id)
        if now.is_fully_pruned:
            return Deletion(was_gone=True)
        if reason := keep_reason(now, run):
            return Deletion(kept=reason)
        store = _store(client, now)
        before = _retried(partial(_count, store))
        client.set_logged_model_tags(now.model_id, {PRUNED_TAG: BEGUN})
        if reason := keep_reason(checkpoint_by_id(client, now.model_id), run):
            _take_back(client, now)
            return Deletion(kept=reason)
        try:
            _retried(partial(_empty, store))
        except (MlflowException, OSError, TrackingError):
            if _count(store) == before:
                _take_back(client, now)
            raise
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_logged_model_tags(now.model_id, {PRUNED_TAG: finished})
    return Deletion(before)


def delete_entity(client: MlflowClient, checkpoint: Checkpoint) -> None:
    """Delete the LoggedModel of a checkpoint whose files and run are gone.

    Raises:
        TrackingError: the server does not answer.
    """
    with tracking_errors(f"deleting {checkpoint.uri}"):
        client.delete_logged_model(checkpoint.model_id)


def _take_back(client: MlflowClient, before: Checkpoint) -> None:
    """Undo the tag of a checkpoint that still has all its files, unless it was there before.

    The tag is overwritten: deleting it needs more permissions than setting it.
    """
    if not before.is_pruned:
        with suppress(MlflowException):  # if the server is away, the first error is raised
            client.set_logged_model_tags(before.model_id, {PRUNED_TAG: TAKEN_BACK})


def _empty(store: ArtifactRepository) -> None:
    store.delete_artifacts()
    if left := _count(store).files:
        raise TrackingError(f"the artifact store left {left} files undeleted")


def _retried(act: Callable[[], Result]) -> Result:
    """The result of `act`, which fails for a moment while another process deletes the same."""
    for attempt in range(1, ATTEMPTS):
        try:
            return act()
        except (MlflowException, OSError):
            time.sleep(SECONDS_BETWEEN_ATTEMPTS * attempt)
    return act()


def _store(client: MlflowClient, checkpoint: Checkpoint) -> ArtifactRepository:
    """The artifact store at the checkpoint's own directory, never at a directory above.

    Raises:
        TrackingError: the directory is not its own.
    """
    path = local_directory(checkpoint.location)  # not a URL: `#` and `?` are parts of names
    parts = path.parts if path else urlsplit(checkpoint.location).path.split("/")
    if checkpoint.model_id not in parts or ".." in parts:
        raise TrackingError(
            f"the files of step {checkpoint.step} lie in {checkpoint.location}, which is not a "
            f"directory of their own ({checkpoint.model_id} is not in its path); they are kept"
        )
    return get_artifact_repository(checkpoint.location, tracking_uri=client.tracking_uri)


def _count(store: ArtifactRepository) -> Stored:
    files, size = 0, 0
    folders: list[str | None] = [None]
    while folders:
        for entry in store.list_artifacts(folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                files += 1
                size += entry.file_size or 0
    return Stored(files, size)


def orphans(
    client: MlflowClient, experiment: str | None = None
) -> list[tuple[Checkpoint, RunState]]:
    """Checkpoints of deleted runs, by run and step. MLflow leaves their entities and files.

    Args:
        client: of the tracking server.
        experiment: the name of the only experiment that counts; all experiments, deleted ones too,
            when None.

    Raises:
        TrackingError: no such experiment, or the server does not answer.
    """
    result: list[tuple[Checkpoint, RunState]] = []
    for entry in _experiments(client, experiment):
        checkpoints = [
            checkpoint
            for checkpoint in find_checkpoints(client, entry.experiment_id)
            if checkpoint.run_id
        ]
        with tracking_errors(f"runs of experiment {entry.name!r}"):
            inactive = {checkpoint.run_id for checkpoint in checkpoints}
            inactive -= _active_runs(client, entry.experiment_id) if inactive else set()
            states = {run_id: _run_state(client, run_id) for run_id in sorted(inactive)}
        for checkpoint in sorted(
            checkpoints, key=lambda checkpoint: (checkpoint.run_id, checkpoint.step)
        ):
            state = states.get(checkpoint.run_id, RunState.ACTIVE)
            if state is not RunState.ACTIVE:
                result.append((checkpoint, state))
    return result


def _experiments(client: MlflowClient, name: str | None) -> Iterator[Experiment]:
    with tracking_errors("experiments"):
        if name is not None:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise TrackingError(no_experiment(client, name))
            yield experiment
            return
        yield from all_pages(client.search_experiments, ViewType.ALL, max_results=PER_REQUEST)


def _active_runs(client: MlflowClient, experiment_id: str) -> set[str]:
    runs = all_pages(client.search_runs, [experiment_id], "", ViewType.ACTIVE_ONLY, PER_REQUEST)
    return {run.info.run_id for run in runs}


def _run_state(client: MlflowClient, run_id: str) -> RunState:
    """The state of a run by its id."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return RunState.GONE
    deleted = run.info.lifecycle_stage == LifecycleStage.DELETED
    return RunState.DELETED if deleted else RunState.ACTIVE
