"""Removing the files of a checkpoint; its entity, params and figures stay.

A tag says first that it is about to happen, and in the end when it was done. So whoever comes next
goes on where another was killed, and validators know why there are no files.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import (
    BEGUN,
    PRUNED_TAG,
    TAKEN_BACK,
    Checkpoint,
    checkpoint_by_id,
)
from mlflow_dr.tracking.claims import standing
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.fetching import local_directory
from mlflow_dr.tracking.results import PREFIX, State, state_of

log = logging.getLogger(__name__)

BEST_PREFIX = "mlflow_dr.best."
CLAIM = re.compile(rf"{re.escape(PREFIX)}(.+)\.claim\.\d+")
ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 0.5
VERSIONS_PER_REQUEST = 1000

Result = TypeVar("Result")
Why = Callable[[Checkpoint], str]


class Stored(NamedTuple):
    """What lies in the artifact store."""

    files: int
    bytes: int


class Removal(NamedTuple):
    """What came of removing a checkpoint's files.

    Attributes:
        stored: what was there and is not any more.
        kept: why they were left; empty where they were removed.
        was_gone: whether somebody had removed them before.
    """

    stored: Stored
    kept: str = ""
    was_gone: bool = False


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether its files were all published and none was removed."""
    return checkpoint.ready and not checkpoint.is_pruned


def not_in_mlflow(checkpoint: Checkpoint) -> str:
    """Where a checkpoint lies that was not published but found; empty for all others."""
    return f"found in {checkpoint.directory}" if checkpoint.directory else ""


def in_use(checkpoint: Checkpoint) -> str:
    """Why a checkpoint's files are not to be touched: not ours, or somebody is at them."""
    if reason := not_in_mlflow(checkpoint):
        return reason
    if checkpoint.pending:
        return "pending"
    names = {found[1] for key in checkpoint.params if (found := CLAIM.fullmatch(key))}
    for name in sorted(names):
        there = standing(checkpoint, name)
        if there is None or there.given_back or state_of(checkpoint, name) is State.DONE:
            continue
        if there.owner is None or not there.owner.is_gone:
            return f"being validated by {there.owner or 'somebody'}"
    return ""


def needed(checkpoint: Checkpoint) -> str:
    """Why a checkpoint of a run that is there is to be kept: in use, or called the best."""
    best = sorted(key for key in checkpoint.tags if key.startswith(BEST_PREFIX))
    called = f"called the best by {best[0].removeprefix(BEST_PREFIX)}" if best else ""
    return in_use(checkpoint) or called


def registered(client: MlflowClient, checkpoints: Collection[Checkpoint]) -> dict[str, str]:
    """Those checkpoints that are versions of registered models: model id -> `NAME version N`.

    Raises:
        TrackingError: the server does not answer.
    """
    ids = {one.model_id for one in checkpoints}
    places = {one.location.rstrip("/"): one.model_id for one in checkpoints}
    runs = {one.run_id for one in checkpoints}
    found: dict[str, str] = {}
    token = None
    with tracking_errors("looking for registered models"):
        while True:
            page = client.search_model_versions(max_results=VERSIONS_PER_REQUEST, page_token=token)
            for version in page:
                words = f"{version.name} version {version.version}"
                named = [one for one in re.split(r"[/\\]", version.source or "") if one in ids]
                if not named and version.run_id in runs:
                    # a copy of another version names neither; where it lies is told by its own
                    uri = client.get_model_version_download_uri(version.name, version.version)
                    named = [places[uri.rstrip("/")]] if uri.rstrip("/") in places else []
                found |= dict.fromkeys(named, f"registered as {words}")
            token = page.token
            if not token:
                return found


def stored(client: MlflowClient, checkpoint: Checkpoint) -> Stored:
    """How many files of a checkpoint the artifact store has, and their bytes.

    Raises:
        TrackingError: the store does not answer.
    """
    with tracking_errors(f"listing the files of step {checkpoint.step}"):
        return _stored(_store(client, checkpoint))


def prune(client: MlflowClient, checkpoint: Checkpoint, why: Why = needed) -> Removal:
    """Remove the files of a checkpoint, unless it is in use by now.

    A validator that claims it in between is seen, because the tag is written before claims are read
    again; one that claims it later finds the tag, at the latest where it finds no files.

    Args:
        client: where.
        checkpoint: which, as it was seen last.
        why: says of the checkpoint as it is now why it is to be kept.

    Raises:
        TrackingError: the server does not answer, the artifact store refuses, or the files do not
            lie in a place of their own.
    """
    doing = f"removing the files of step {checkpoint.step} (models:/{checkpoint.model_id})"
    with tracking_errors(doing):
        now = checkpoint_by_id(client, checkpoint.model_id)
        if now.is_gone:
            return Removal(Stored(0, 0), was_gone=True)
        if reason := why(now):
            return Removal(Stored(0, 0), kept=reason)
        store = _store(client, now)
        was_there = _tried(partial(_stored, store))
        client.set_logged_model_tags(now.model_id, {PRUNED_TAG: BEGUN})
        if reason := why(checkpoint_by_id(client, now.model_id)):
            _take_back(client, now)
            return Removal(Stored(0, 0), kept=reason)
        try:
            _tried(partial(_empty, store))
        except (MlflowException, OSError, TrackingError):
            if _stored(store) == was_there:
                _take_back(client, now)
            raise
        at = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_logged_model_tags(now.model_id, {PRUNED_TAG: at})
    return Removal(was_there)


def remove_entity(client: MlflowClient, checkpoint: Checkpoint) -> None:
    """Have MLflow forget a checkpoint whose files and run are gone.

    Raises:
        TrackingError: the server does not answer.
    """
    with tracking_errors(f"deleting models:/{checkpoint.model_id}"):
        client.delete_logged_model(checkpoint.model_id)


def _take_back(client: MlflowClient, before: Checkpoint) -> None:
    """Undo the tag of a checkpoint that has all its files still, unless it was there before.

    It is not deleted, which needs more permissions than setting it.
    """
    if not before.is_pruned:
        with suppress(MlflowException):  # of a server that is away now the first error is told
            client.set_logged_model_tags(before.model_id, {PRUNED_TAG: TAKEN_BACK})


def _empty(store: ArtifactRepository) -> None:
    store.delete_artifacts()
    if left := _stored(store).files:
        raise TrackingError(f"{left} files are still there: the artifact store left them")


def _tried(act: Callable[[], Result]) -> Result:
    """What `act` gives; another who empties the same place may be in its way for a moment."""
    for attempt in range(1, ATTEMPTS):
        try:
            return act()
        except (MlflowException, OSError):
            time.sleep(SECONDS_BETWEEN_ATTEMPTS * attempt)
    return act()


def _store(client: MlflowClient, checkpoint: Checkpoint) -> ArtifactRepository:
    """The artifact store, at the checkpoint's own place in it, and not at what lies above.

    Raises:
        TrackingError: the place is not its own.
    """
    here = local_directory(checkpoint.location)  # a path, where # and ? are letters like others
    parts = here.parts if here else urlsplit(checkpoint.location).path.split("/")
    if checkpoint.model_id not in parts or ".." in parts:
        raise TrackingError(
            f"step {checkpoint.step} lies at {checkpoint.location}, which is not a place of its "
            f"own: {checkpoint.model_id} is not in its path; its files are left alone"
        )
    return get_artifact_repository(checkpoint.location, tracking_uri=client.tracking_uri)


def _stored(store: ArtifactRepository) -> Stored:
    files, size = 0, 0
    folders: list[str | None] = [None]
    while folders:
        for one in store.list_artifacts(folders.pop()):
            if one.is_dir:
                folders.append(one.path)
            else:
                files += 1
                size += one.file_size or 0
    return Stored(files, size)
