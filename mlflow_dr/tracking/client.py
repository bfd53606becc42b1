"""The way to the tracking server, and MLflow's errors as one line each."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.client import TrackingServiceClient

from mlflow_dr.errors import ForbiddenError, MlflowDrError, TrackingError
from mlflow_dr.terminal import HIDDEN, one_line_of, without_secrets

Client = MlflowClient  # the name for rooms that leave mlflow to this one

URI_VARIABLE = "MLFLOW_TRACKING_URI"
CLIENT_ERROR, SERVER_ERROR = 400, 500
FORBIDDEN = 403
PASSING = {408, 429, 499}  # time is up, too many requests: what the server may say otherwise later
DENIED = "PERMISSION_DENIED"
NOBODY = "Connection refused"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FEW_RETRIES = "2"
SECONDS_TO_CONNECT = 2.0
FEWEST_TRIES = 2  # one answer that is late says little
SECONDS_BETWEEN_TRIES = 0.1  # twice as long each time
AT_ONCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", RETRIES: "0"}
SQLITE = "sqlite:///"
LONGEST_REASON = 300  # characters of what MLflow or a driver says
DRIVERS = {  # module -> what pip installs
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
_set_by_us: set[str] = set()
_one_at_a_time = threading.RLock()  # they change the process's environment


def tracking_uri() -> str:
    """Where MLflow is set to write."""
    return str(mlflow.get_tracking_uri())


def shown_uri(uri: str | None = None) -> str:
    """A tracking URI, MLflow's own by default, without what is secret in it."""
    return without_secrets(tracking_uri() if uri is None else uri)


def is_server(uri: str) -> bool:
    """Whether a tracking URI is a server's, which has pages; else it is a store's."""
    return uri.startswith(("http:", "https:"))


def connect(uri: str | None = None, may_create: bool = True) -> MlflowClient:
    """A client for the tracking server that MLflow is set to, or for `uri`.

    MLflow itself tries for minutes before it gives up on a server. Here a server that refuses the
    connection is told at once, and one whose answers make no sense or break off after seconds.

    Args:
        uri: the server; MLflow's own when None.
        may_create: whether a database file that is not there is made; who only reads needs none.

    Raises:
        TrackingError: nothing answers there, or the store cannot be opened, or is not there.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if uri:
        mlflow.set_tracking_uri(uri)
    uri = tracking_uri()
    if not may_create and (missing := _missing_file(uri)):
        raise TrackingError(
            f"there is no tracking store {shown_uri(uri)} ({missing} does not exist): start this "
            f"where the training was started, or set {URI_VARIABLE} or --tracking-uri"
        )
    deadline, wait = time.monotonic() + SECONDS_TO_CONNECT, SECONDS_BETWEEN_TRIES
    tries = 0
    while True:
        tries += 1
        try:
            with short_timeouts():
                client = MlflowClient(uri)
                client._tracking_client = _TrackingClient(client.tracking_uri)
                client.search_experiments(max_results=1)
        except ModuleNotFoundError as error:
            module = error.name or str(error)
            raise TrackingError(
                f"tracking store {shown_uri(uri)} needs the Python module {module!r}, which is not "
                f"installed: pip install '{DRIVERS.get(module, module)}'"
            ) from error
        except Exception as error:  # drivers and plugins of MLflow raise errors of their own
            again = is_server(uri) and is_transient(error)
            is_late = tries >= FEWEST_TRIES and time.monotonic() + wait > deadline
            if not again or NOBODY in str(error) or is_late:
                refusal = _refusal(error)
                raise TrackingError(refusal or _unreachable(uri, _text(error))) from error
        else:
            return client
        time.sleep(wait)
        wait *= 2


class _TrackingClient(TrackingServiceClient):
    """MLflow's client below `MlflowClient`, which refuses answers that are about something else.

    MLflow takes an empty answer with status 200 for a run, or a model, that has no id, no files and
    no place for them: artifacts would then go into the working directory.
    """

    def create_run(self, *args: Any, **kwargs: Any) -> Run:
        run = super().create_run(*args, **kwargs)
        _check_answer(run.info.run_id)
        return run

    def get_run(self, run_id: str) -> Run:
        run = super().get_run(run_id)
        _check_answer(run.info.run_id == run_id)
        return run

    def create_logged_model(self, *args: Any, **kwargs: Any) -> LoggedModel:
        model = super().create_logged_model(*args, **kwargs)
        _check_answer(model.model_id)
        return model

    def get_logged_model(self, model_id: str) -> LoggedModel:
        model = super().get_logged_model(model_id)
        _check_answer(model.model_id == model_id)
        return model

    def finalize_logged_model(self, model_id: str, status: LoggedModelStatus) -> LoggedModel:
        model = super().finalize_logged_model(model_id, status)
        _check_answer((model.model_id, model.status) == (model_id, status))
        return model


def _check_answer(is_meant: object) -> None:
    if not is_meant:
        raise OSError("the server's answer is not about what was asked for")


def _missing_file(uri: str) -> str:
    """The file of a database that is not there; empty for all other stores."""
    path = uri.removeprefix(SQLITE).partition("?")[0]
    is_file = uri.startswith(SQLITE) and path not in ("", ":memory:")
    return path if is_file and not os.path.exists(path) else ""  # noqa: PTH110 - any string


def server_responds(client: MlflowClient) -> bool:
    """Whether the server answers now, be it with a refusal."""
    try:
        with short_timeouts():
            client.search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - what is no answer of MLflow's fails in many ways
        return not is_transient(error)
    return True


def is_transient(error: BaseException) -> bool:
    """Whether MLflow's error is no refusal of the server: an answer broke off, or made no sense."""
    if not isinstance(error, MlflowException):
        return True
    if error.__cause__ is not None:  # MLflow says "no such model" of any failure to ask for it
        return is_transient(error.__cause__)
    status = error.get_http_status_code()
    return not CLIENT_ERROR <= status < SERVER_ERROR or status in PASSING


def write_once(client: MlflowClient, model_id: str, key: str, value: str) -> None:
    """Write a parameter of a LoggedModel, which the server refuses if another value is there.

    `MlflowClient.log_model_params` asks for the whole model first; where many validators share a
    server, that is a fifth of all requests.

    Raises:
        MlflowException: refused, or the server does not answer.
    """
    writer = getattr(client, "_tracking_client", client)
    writer.log_model_params(model_id, {key: value})


def limit_mlflow_retries() -> None:
    """Have MLflow give up on a server soon, where the user has not said when; we wait better."""
    if RETRIES not in os.environ:
        os.environ[RETRIES] = FEW_RETRIES
        _set_by_us.add(RETRIES)


@contextmanager
def tracking_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow raises into a TrackingError of one line; a ForbiddenError where it is one.

    Where an answer is cut off, or is another server's, that may be an error of any kind.
    """
    try:
        yield
    except (MlflowDrError, MemoryError):
        raise
    except Exception as error:
        is_forbidden = isinstance(error, PermissionError) or _code(error) == DENIED
        kind = ForbiddenError if is_forbidden else TrackingError
        raise kind(f"{doing}: {_refusal(error) or _one_line(error)}") from error


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Requests of MLflow's that fail within seconds, where the user has not set how long to try."""
    with _one_at_a_time:
        before = {key: os.environ.get(key) for key in AT_ONCE}
        free = [key for key, value in before.items() if value is None or key in _set_by_us]
        os.environ.update({key: AT_ONCE[key] for key in free})
        try:
            yield
        finally:
            for key in free:
                if (value := before[key]) is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def _refusal(error: Exception) -> str:
    """What is missing here, or what a server with users asks for; empty for other errors."""
    if isinstance(error, ImportError):
        return f"{_one_line(error)}, and this artifact store needs it; install it here"
    code = _code(error)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "UNAUTHENTICATED":
        return (
            f"the tracking server does not know user {user!r} with this password"
            if user
            else "the tracking server asks who you are"
        ) + "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if code == DENIED:
        return (
            f"user {user!r} may not do that: publishing and validating need the permission EDIT on "
            "the experiment, removing files needs MANAGE, looking READ; an administrator of the "
            "tracking server grants it"
        )
    return ""


def _code(error: Exception) -> str:
    """MLflow's name for the kind of an error; empty where it has none."""
    answer = getattr(error, "response", None)  # of the artifact store, without MLflow's codes
    if getattr(answer, "status_code", None) == FORBIDDEN:
        return DENIED
    return error.error_code if isinstance(error, MlflowException) else ""


def _one_line(error: Exception) -> str:
    return one_line_of(_text(error), LONGEST_REASON)


def _text(error: Exception) -> str:
    """What an error says; of the tracking server's URI nothing that is secret."""
    uri = tracking_uri()
    text = str(error).replace(uri, shown_uri(uri))
    query = uri.partition("?")[2]  # requests' errors show it without the server
    return text.replace(query, HIDDEN) if query else text


def _unreachable(uri: str, reason: str) -> str:
    _, caused, cause = reason.partition("Caused by ")  # urllib3's layers of exceptions
    if caused:
        reason = cause.rpartition("): ")[2].removesuffix('"))').removesuffix("'))")
    reason = one_line_of(reason, LONGEST_REASON)
    if not is_server(uri):
        return f"tracking store {shown_uri(uri)}: {reason}"
    return (
        f"tracking server {shown_uri(uri)} does not answer ({reason}); "
        f"is it running, and is {URI_VARIABLE} right?"
    )


REFUSED_BY_FILES = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
        *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    )
)
# 4xx answers after which another try may succeed: timeout, conflict, too early, too many, closed
MAY_PASS = frozenset((408, 409, 423, 425, 429, 499))
NOT_IMPLEMENTED = 501
UNCLEAR = 500  # what MLflow says of whatever it has wrapped
# MLflow and botocore have no code or status for these
NO_STORE = "Could not find a registered artifact repository"
NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
)


def is_permanent(error: BaseException) -> bool:
    """Whether a request or upload would fail again: what it needs is missing, or it is refused.

    A missing module, no permission, no such bucket, place or run, a place that is read-only. Of
    errors that were raised from each other the outermost that is clear decides.
    """
    verdicts = (_verdict(one) for one in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def is_unknown_store(error: BaseException) -> bool:
    """Whether MLflow knows no artifact store of the URI's kind: its plugin is not installed."""
    return NO_STORE in str(error)


def _verdict(error: BaseException) -> bool | None:
    """Whether one error lasts; None where it does not say."""
    if isinstance(error, ImportError):
        return True
    if type(error).__name__ in NO_CREDENTIALS or is_unknown_store(error):
        return True
    status = _status(error)
    if status is not None and status != UNCLEAR:
        return (400 <= status < 500 and status not in MAY_PASS) or status == NOT_IMPLEMENTED
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in REFUSED_BY_FILES
    return None


def _status(error: Any) -> int | None:
    """The HTTP status that an error stands for; None where it says none.

    MLflow's errors, those of requests, of botocore, and of Google's and Azure's clients.
    """
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(answer, "status_code", None)
    for status in (found, getattr(error, "status_code", None), getattr(error, "code", None)):
        if isinstance(status, int):
            return int(status)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
