"""Checks of services: the tracking server with its rights and artifacts, and the hub."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.error import HTTPError

from mlflow_dr.background import BackgroundTask
from mlflow_dr.doctor.finding import Finding, caught
from mlflow_dr.doctor.machine import use_files
from mlflow_dr.errors import MlflowDrError, one_line
from mlflow_dr.files import nearest_existing

Result = TypeVar("Result")

SECONDS_FOR_NETWORK = 20.0
SECONDS_FOR_HUB = 5.0
SECONDS_FOR_REQUEST = "5"  # MLflow's own limit is two minutes


def check_tracking(uri: str | None) -> Iterator[Finding]:
    """The tracking server or store: whether it answers, its version, rights and artifacts."""
    from mlflow_dr.tracking import access
    from mlflow_dr.tracking.client import connect, missing_file, shown_uri
    from mlflow_dr.tracking.client import tracking_uri as chosen_uri

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", SECONDS_FOR_REQUEST)
    if missing := missing_file(uri or chosen_uri()):
        use_files(nearest_existing(Path(missing)))
        yield Finding("tracking", "ok", f"{shown_uri(uri)} does not exist yet; a training makes it")
        return
    client = _within("the tracking server", partial(connect, uri, may_create=False))
    version = _within("the tracking server", access.server_version)
    old = bool(version) and access.is_too_old(version)
    text = f"{shown_uri()} answers" + (f", mlflow {version}" if version else "")
    advice = f"; upgrade the server to {'.'.join(map(str, access.OLDEST_SERVER))} or newer"
    yield Finding("tracking", "warn" if old else "ok", text + (advice if old else ""))
    experiment = _within("the tracking server", partial(access.usual_experiment, client))
    if experiment is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        yield Finding("rights", "warn", f"not tried: experiment {name!r} does not exist yet")
        return
    yield from caught("rights", partial(_check_rights, client, experiment))
    yield from caught("artifacts", partial(_check_artifacts, experiment))


def _check_rights(client: Any, experiment: Any) -> Iterator[Finding]:
    from mlflow_dr.tracking.access import try_writing

    _within("the tracking server", partial(try_writing, client, experiment))
    yield Finding("rights", "ok", f"may write to experiment {experiment.name!r}")


def _check_artifacts(experiment: Any) -> Iterator[Finding]:
    from mlflow_dr.tracking.access import try_artifacts
    from mlflow_dr.tracking.client import shown_uri

    doubt = _within("the artifact store", partial(try_artifacts, experiment))
    location = shown_uri(experiment.artifact_location)
    text = f"{location}: {doubt}" if doubt else f"{location} takes files and gives them back"
    yield Finding("artifacts", "warn" if doubt else "ok", text)


def check_hub() -> Iterator[Finding]:
    """The Hugging Face hub: whether it answers, and whether it knows the token."""
    from huggingface_hub import constants, get_token

    folder = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", f"offline (HF_HUB_OFFLINE): only what is in {folder} is used")
        return
    token = get_token()
    page = f"{constants.ENDPOINT}/api/{'whoami-v2' if token else 'models?limit=1'}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(page, headers=headers)
    try:
        _within("the hub", lambda: urllib.request.urlopen(request, timeout=SECONDS_FOR_HUB).close())
    except HTTPError as error:
        if token and error.code in (401, 403):
            raise MlflowDrError(
                f"{constants.ENDPOINT} refuses the token; set HF_TOKEN to a valid one, or remove it"
            ) from error
        problem: str = f"HTTP {error.code}"
    except (OSError, MlflowDrError) as error:
        problem = one_line(error)
    else:
        signed = "with a token" if token else "without a token"
        yield Finding("hub", "ok", f"{constants.ENDPOINT} answers {signed}; files go to {folder}")
        return
    yield Finding(
        "hub",
        "warn",
        f"{constants.ENDPOINT} does not answer ({problem}): nothing can be downloaded; set "
        f"HF_HUB_OFFLINE=1 to use what is in {folder}",
    )


def _within(name: str, act: Callable[[], Result], seconds: float = SECONDS_FOR_NETWORK) -> Result:
    """The result of a request, or an error if it takes too long.

    Raises:
        MlflowDrError: it took longer.
    """
    task = BackgroundTask(act, "doctor")
    result = task.wait(seconds)
    if not task.is_done:
        raise MlflowDrError(
            f"{name} gave no answer within {seconds:.0f} s; check the address, the network and "
            "proxies"
        )
    return cast(Result, result)
