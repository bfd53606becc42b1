"""The run that somebody else has made for us: a training loop, or `mlflow run`."""

from __future__ import annotations

import os

import mlflow

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    RUN_VARIABLE,
    SPLIT_PARAM,
    TrackedRun,
    find_run,
)


def current_run_id(asked: str | None = None) -> str:
    """The run that was asked for, else MLflow's active run, else `$MLFLOW_RUN_ID`.

    The active run is the calling thread's own. No request is made.

    Raises:
        UsageError: there is none of the three.
    """
    if asked:
        return asked
    if active := mlflow.active_run():
        return str(active.info.run_id)
    if named := os.environ.get(RUN_VARIABLE):
        return named
    raise UsageError(
        "no MLflow run to publish to: start one around the training (`with mlflow.start_run():`, "
        f"or report_to='mlflow' in Hugging Face's arguments), set {RUN_VARIABLE}, or give run_id"
    )


def run_of_project(tracking_uri: str | None = None) -> TrackedRun | None:
    """The run that `mlflow run`, or another parent process, has made for this command.

    Raises:
        TrackingError: it is gone, or the server does not answer.
    """
    run_id = os.environ.get(RUN_VARIABLE)
    return find_run(connect(tracking_uri, may_create=False), run_id) if run_id else None


def name_collection(run: TrackedRun, collection: str, split: str) -> None:
    """Note on a run what its checkpoints are to be validated on.

    Args:
        run: the run.
        collection: the collection's name; a folder's whole path.
        split: the queries.

    Raises:
        UsageError: the run says another split already, which no one can change.
        TrackingError: the server did not take it.
    """
    run.set_tags({DATASET_TAG: collection})
    run.log_params({DATASET_PARAM: collection, SPLIT_PARAM: split})
    known = run.fetch().data.params[SPLIT_PARAM]
    if known != split:
        raise UsageError(
            f"run {run.id} has {SPLIT_PARAM}={known!r} already, and MLflow's params are written "
            f"once; leave split={split!r} out, or give the validator `--split {split}`"
        )
