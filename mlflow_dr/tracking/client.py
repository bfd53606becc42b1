"""The way to the tracking server, and MLflow's errors as one line each."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import TrackingError

SECONDS_TO_ANSWER = 10.0
PORTS = {"http": 80, "https": 443}


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
    uri = mlflow.get_tracking_uri()
    address = urlsplit(uri)
    if address.scheme in PORTS and address.hostname:
        _check_answers(uri, address.hostname, address.port or PORTS[address.scheme])
    with tracking_errors(f"tracking store {_without_password(uri)}"):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def tracking_errors(doing: str) -> Iterator[None]:
    """Turn MLflow's errors into a TrackingError of one line."""
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        raise TrackingError(f"{doing}: {reason}") from error


def _check_answers(uri: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise TrackingError(
            f"tracking server {_without_password(uri)} does not answer ({error}); "
            "is it running, and is MLFLOW_TRACKING_URI right?"
        ) from error


def _without_password(uri: str) -> str:
    address = urlsplit(uri)
    if address.password is None:
        return uri
    return uri.replace(f":{address.password}@", ":***@")
