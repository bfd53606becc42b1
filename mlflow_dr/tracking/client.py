"""The way to the tracking server, and MLflow's errors as one line each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import TrackingError

URI_VARIABLE = "MLFLOW_TRACKING_URI"
AT_ONCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def tracking_uri() -> str:
    """Where MLflow is set to write."""
    return str(mlflow.get_tracking_uri())


def connect(uri: str | None = None) -> MlflowClient:
    """A client for the tracking server that MLflow is set to, or for `uri`.

    MLflow itself tries for minutes before it gives up on a server; here a server that does not
    answer is told at once.

    Raises:
        TrackingError: nothing answers there, or the store cannot be opened.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if uri:
        mlflow.set_tracking_uri(uri)
    uri = tracking_uri()
    try:
        with _impatient():
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise TrackingError(_unreachable(uri, " ".join(str(error).split()))) from error
    return client


@contextmanager
def tracking_errors(doing: str) -> Iterator[None]:
    """Turn MLflow's errors into a TrackingError of one line."""
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        raise TrackingError(f"{doing}: {reason}") from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Requests of MLflow's that fail within seconds, where the user has not set how long to try."""
    added = {key: value for key, value in AT_ONCE.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _unreachable(uri: str, reason: str) -> str:
    shown = _without_password(uri)
    _, caused, cause = reason.partition("Caused by ")  # urllib3's layers of exceptions
    if caused:
        reason = cause.rpartition("): ")[2].removesuffix('"))').removesuffix("'))")
    reason = reason.replace(uri, shown)[:400]
    if urlsplit(uri).scheme not in ("http", "https"):
        return f"tracking store {shown}: {reason}"
    return (
        f"tracking server {shown} does not answer ({reason}); "
        f"is it running, and is {URI_VARIABLE} right?"
    )


def _without_password(uri: str) -> str:
    address = urlsplit(uri)
    if address.password is None:
        return uri
    return uri.replace(f":{address.password}@", ":***@")
