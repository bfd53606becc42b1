"""What this user may do on a tracking server, tried and taken back at once."""

from __future__ import annotations

import os
import re
import urllib.request
import uuid
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.version import VERSION

from mlflow_dr.errors import ForbiddenError, TrackingError
from mlflow_dr.tracking.client import is_server, short_timeouts, tracking_errors, tracking_uri
from mlflow_dr.tracking.fetching import local_directory

PROBE_TAG = "mlflow_dr.probe"
PROBE_FOLDER = "mlflow_dr-probe-"
PROBE_TEXT = "written and removed by `mlflow-dr doctor`\n"
OLDEST_SERVER = (3, 13)  # the oldest mlflow that mlflow_dr itself may be installed with
SECONDS_TO_ANSWER = 5.0


def server_version(uri: str | None = None) -> str:
    """The version of the mlflow that answers: of a server its own; empty if it does not say."""
    uri = uri or tracking_uri()
    if not is_server(uri):
        return VERSION
    address = urlsplit(uri)
    host = address.netloc.rpartition("@")[2]  # urllib takes a user name for a part of the host
    page = f"{address.scheme}://{host}{address.path.rstrip('/')}/version"
    with suppress(OSError, HTTPException, ValueError):
        with urllib.request.urlopen(page, timeout=SECONDS_TO_ANSWER) as answer:
            text = answer.read(64).decode(errors="replace").strip()
        if re.fullmatch(r"\d+\.\d+[\w.+-]*", text):
            return text
    return ""


def is_too_old(version: str) -> bool:
    """Whether a server of this version is older than any that mlflow_dr was tried with."""
    major, minor = version.split(".")[:2]
    return (int(major), int(re.match(r"\d+", minor)[0])) < OLDEST_SERVER  # type: ignore[index]


def usual_experiment(client: MlflowClient) -> Experiment | None:
    """The experiment of a new run, by MLflow's variables; None if the run would create it.

    Raises:
        TrackingError: the server does not answer, or the experiment was deleted.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    with tracking_errors("reading the experiment"), short_timeouts():
        if name:
            found = client.get_experiment_by_name(name)
        else:
            found = client.get_experiment(os.environ.get("MLFLOW_EXPERIMENT_ID") or "0")
    if found is not None and found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {found.name!r} was deleted; restore it with `mlflow experiments restore "
            f"-x {found.experiment_id}`, or choose another by MLFLOW_EXPERIMENT_NAME"
        )
    return found


def try_writing(client: MlflowClient, experiment: Experiment) -> None:
    """Set a tag of an experiment and delete it again, for which the server wants EDIT.

    Raises:
        TrackingError: refused, or the server does not answer.
    """
    with tracking_errors(f"writing to experiment {experiment.name!r}"), short_timeouts():
        client.set_experiment_tag(experiment.experiment_id, PROBE_TAG, "1")
        client.delete_experiment_tag(experiment.experiment_id, PROBE_TAG)


def try_artifacts(experiment: Experiment) -> str:
    """Write a file into an experiment's artifact store, read it, and delete it again.

    Nothing is written if it could not be deleted.

    Returns:
        What could not be tried, and why; an empty string if all went well.

    Raises:
        TrackingError: a step failed.
    """
    location, folder = experiment.artifact_location, f"{PROBE_FOLDER}{uuid.uuid4().hex}"
    directory = local_directory(location)
    if directory is not None:
        if is_server(tracking_uri()):
            return (
                f"the server names a directory ({directory}), which it shares with this machine "
                "only if both mount it; start it with --artifacts-destination otherwise"
            )
        if not directory.exists():
            _check_parent(directory)
            return ""
    with tracking_errors(f"artifact store {location}"), short_timeouts():
        store = get_artifact_repository(location)
        try:
            store.delete_artifacts(folder)
        except Exception as error:  # noqa: BLE001 - each store has its own; only a refusal counts
            try:
                with tracking_errors("deleting"):
                    raise error
            except ForbiddenError:
                return (
                    "not tried, because the file could not be deleted again: that needs the "
                    "permission MANAGE, as `mlflow-dr prune` does"
                )
            except TrackingError:
                pass  # there is no such file, which is right
        with TemporaryDirectory() as own:
            file, target = Path(own, "probe.txt"), Path(own, "got")
            target.mkdir()
            file.write_text(PROBE_TEXT, encoding="utf-8")
            store.log_artifact(str(file), folder)
            try:
                got = Path(store.download_artifacts(f"{folder}/{file.name}", str(target)))
                if got.read_text(encoding="utf-8") != PROBE_TEXT:
                    raise OSError("it does not return what was written")
            finally:
                store.delete_artifacts(folder)
    return ""


def _check_parent(directory: Path) -> None:
    parent = next(folder for folder in directory.parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TrackingError(f"artifact store {directory}: it cannot be made in {parent}")
