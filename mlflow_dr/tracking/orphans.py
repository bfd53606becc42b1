"""Checkpoints of runs that were deleted; MLflow leaves their entities and files where they are."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import PER_REQUEST, Checkpoint, find_checkpoints
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.following import no_experiment


class RunState(Enum):
    """What has become of a checkpoint's run."""

    ACTIVE = "active"
    DELETED = "deleted"
    GONE = "gone"


class Orphan(NamedTuple):
    """A checkpoint whose run was deleted: it may be restored, or is gone since `mlflow gc`."""

    checkpoint: Checkpoint
    run: RunState


def orphans(client: MlflowClient, experiment: str | None = None) -> list[Orphan]:
    """Checkpoints of deleted runs, by run and step.

    Args:
        client: where.
        experiment: of this experiment only, by name; of all, deleted ones too, when None.

    Raises:
        TrackingError: no such experiment, or the server does not answer.
    """
    found: list[Orphan] = []
    for one in _experiments(client, experiment):
        checkpoints = [one for one in find_checkpoints(client, one.experiment_id) if one.run_id]
        with tracking_errors(f"runs of experiment {one.name!r}"):
            left = {one.run_id for one in checkpoints}
            left -= _active_runs(client, one.experiment_id) if left else set()
            states = {run_id: _state_of(client, run_id) for run_id in sorted(left)}
        for checkpoint in sorted(checkpoints, key=lambda one: (one.run_id, one.step)):
            state = states.get(checkpoint.run_id, RunState.ACTIVE)
            if state is not RunState.ACTIVE:
                found.append(Orphan(checkpoint, state))
    return found


def _experiments(client: MlflowClient, name: str | None) -> Iterator[Experiment]:
    with tracking_errors("experiments"):
        if name is not None:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise TrackingError(no_experiment(client, name))
            yield found
            return
        token = None
        while True:
            page = client.search_experiments(
                ViewType.ALL, max_results=PER_REQUEST, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return


def _active_runs(client: MlflowClient, experiment_id: str) -> set[str]:
    active: set[str] = set()
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], "", ViewType.ACTIVE_ONLY, PER_REQUEST, page_token=token
        )
        active |= {run.info.run_id for run in page}
        token = page.token
        if not token:
            return active


def _state_of(client: MlflowClient, run_id: str) -> RunState:
    """What the server says of a run by its id; any error but that there is none is one."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return RunState.GONE
    deleted = run.info.lifecycle_stage == LifecycleStage.DELETED
    return RunState.DELETED if deleted else RunState.ACTIVE
