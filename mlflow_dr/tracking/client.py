"""The connection to the tracking server, and MLflow's errors as one line each."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking._tracking_service.client import TrackingServiceClient

from mlflow_dr import compat
from mlflow_dr.errors import ForbiddenError, MlflowDrError, TrackingError
from mlflow_dr.terminal import HIDDEN, one_line_of, without_secrets

Client = MlflowClient  # for the other packages, which do not import mlflow

URI_VARIABLE = "MLFLOW_TRACKING_URI"
CLIENT_ERROR, SERVER_ERROR = 400, 500
FORBIDDEN = 403
PASSING = {408, 429, 499}  # timeout, too many requests: another try may succeed
DENIED = "PERMISSION_DENIED"
NOBODY = "Connection refused"
NO_ANSWER = (
    *(requests.exceptions.ConnectionError, requests.exceptions.Timeout),
    requests.exceptions.RetryError,  # 429 or 5xx again and again
)
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FEW_RETRIES = "2"
SECONDS_TO_CONNECT = 2.0
FEWEST_TRIES = 2  # one late answer does not mean that the server is away
SECONDS_BETWEEN_TRIES = 0.1  # twice as long each time
BROKEN_ANSWERS = 4  # of one request in a row
REPEATABLE = (  # requests that may reach the server twice
    *("get_run", "get_metric_history", "get_experiment_by_name", "get_logged_model"),
    *("search_experiments", "search_runs", "search_logged_models"),
    *("log_batch", "log_param", "log_inputs", "set_tag", "set_logged_model_tags"),
    *("update_run", "set_terminated"),
)
AT_ONCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", RETRIES: "0"}
SQLITE = "sqlite:///"
LONGEST_REASON = 300  # characters of a message of MLflow or a driver
DRIVERS = {  # module -> what pip installs
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
_set_by_us: set[str] = set()
_one_at_a_time = threading.RLock()  # they change the process's environment


def tracking_uri() -> str:
    """The tracking URI that MLflow is set to."""
    return str(mlflow.get_tracking_uri())


def shown_uri(uri: str | None = None) -> str:
    """A tracking URI without passwords and tokens; MLflow's own by default."""
    return without_secrets(tracking_uri() if uri is None else uri)


def is_server(uri: str) -> bool:
    """Whether a tracking URI belongs to a server, which also has web pages, or to a store."""
    return uri.startswith(("http:", "https:"))


def connect(uri: str | None = None, may_create: bool = True) -> MlflowClient:
    """A client for the tracking server that MLflow is set to, or for `uri`.

    MLflow itself tries for minutes before it gives up on a server. This gives up at once if the
    server refuses the connection, and after seconds if its answers break off or make no sense.

    Args:
        uri: the server; MLflow's own when None.
        may_create: create a missing database file. Commands that only read set it to False.

    Raises:
        TrackingError: nothing answers, or the store is missing or cannot be opened.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if uri:
        mlflow.set_tracking_uri(uri)
    uri = tracking_uri()
    if not may_create and (missing := missing_file(uri)):
        raise TrackingError(
            f"there is no tracking store {shown_uri(uri)} ({missing} does not exist): run this in "
            f"the directory of the training, or set {URI_VARIABLE} or --tracking-uri"
        )
    deadline, wait = time.monotonic() + SECONDS_TO_CONNECT, SECONDS_BETWEEN_TRIES
    tries = 0
    while True:
        tries += 1
        try:
            with short_timeouts():
                client = MlflowClient(uri)
                compat.set_service_client(client, _TrackingClient(client.tracking_uri))
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
    """MLflow's client below `MlflowClient`, which does not trust the server's answers.

    MLflow takes an empty answer with status 200 for a run or a model without an id and without an
    artifact location. Artifacts would then go into the working directory. So answers are checked
    to be about what was asked.

    MLflow repeats a request that gets no answer, or one with status 429 or 5xx. It does not if the
    answer breaks off or makes no sense. Then this client repeats those of REPEATABLE.
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


def _repeated(request: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `_TrackingClient` that is called again after a broken answer."""

    @wraps(request)
    def repeating(client: TrackingServiceClient, *args: Any, **kwargs: Any) -> Any:
        for tries in range(1, BROKEN_ANSWERS):
            try:
                return request(client, *args, **kwargs)
            except Exception as error:
                if not (is_server(client.tracking_uri) and _is_broken_answer(error)):
                    raise
            time.sleep(2 ** (tries - 1) * SECONDS_BETWEEN_TRIES)
        return request(client, *args, **kwargs)

    return repeating


for _name in REPEATABLE:
    setattr(_TrackingClient, _name, _repeated(getattr(_TrackingClient, _name)))


def _is_broken_answer(error: Exception) -> bool:
    """Whether the server answered, and neither as MLflow does nor with a refusal."""
    if isinstance(error, RestException) or not is_transient(error):
        return False
    return not any(isinstance(cause, NO_ANSWER) for cause in _chain(error))


def _check_answer(is_expected: object) -> None:
    if not is_expected:
        raise OSError("the server's answer is not about what was asked for")


def missing_file(uri: str) -> str:
    """The missing file of a sqlite store; empty if it exists, and for all other stores."""
    path = uri.removeprefix(SQLITE).partition("?")[0]
    is_file = uri.startswith(SQLITE) and path not in ("", ":memory:")
    return path if is_file and not os.path.exists(path) else ""  # noqa: PTH110 - any string


def server_responds(client: MlflowClient) -> bool:
    """Whether the server answers now; a refusal is an answer, too."""
    try:
        with short_timeouts():
            client.search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - a broken answer fails in many ways
        return not is_transient(error)
    return True


def all_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """All results of one of MLflow's searches, page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: the server did not refuse, but gave no proper answer."""
    if not isinstance(error, MlflowException):
        return True
    if error.__cause__ is not None:  # MLflow reports "no such model" for any failed request
        return is_transient(error.__cause__)
    status = error.get_http_status_code()
    return not CLIENT_ERROR <= status < SERVER_ERROR or status in PASSING


def write_once(client: MlflowClient, model_id: str, key: str, value: str) -> None:
    """Write a parameter of a LoggedModel; the server refuses if it has another value.

    `MlflowClient.log_model_params` would request the whole model first. With many validators that
    is a fifth of all requests.

    Raises:
        MlflowException: refused, or the server does not answer.
    """
    compat.service_client(client).log_model_params(model_id, {key: value})


def limit_mlflow_retries() -> None:
    """Let MLflow give up on a server soon, unless the user set its retries; `Patience` waits."""
    if RETRIES not in os.environ:
        os.environ[RETRIES] = FEW_RETRIES
        _set_by_us.add(RETRIES)


@contextmanager
def tracking_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow raises into a TrackingError of one line; a ForbiddenError if it is one.

    All kinds of errors are caught, because a broken answer can raise any of them.

    Args:
        doing: what is done, for the message.
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
    """Let MLflow's requests fail within seconds, unless the user set its timeout and retries."""
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
    """What to do about a missing module or a missing permission; empty for other errors."""
    if isinstance(error, ImportError):
        return f"{_one_line(error)}, and this artifact store needs it; install it here"
    code = _code(error)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "UNAUTHENTICATED":
        return (
            f"the tracking server does not know user {user!r} with this password"
            if user
            else "the tracking server requires a user and a password"
        ) + "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if code == DENIED:
        return (
            f"user {user!r} is not allowed to do that: publishing and validating need the "
            "permission EDIT on the experiment, deleting files MANAGE, and reading READ; an "
            "administrator of the tracking server grants it"
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
    """An error's message without the secrets of the tracking URI."""
    uri = tracking_uri()
    text = str(error).replace(uri, shown_uri(uri))
    query = uri.partition("?")[2]  # errors of requests show the query alone
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
        f"check that it is running and that {URI_VARIABLE} is right"
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
UNCLEAR = 500  # MLflow's code for every error that it wraps
# MLflow and botocore have no code or status for these
NO_STORE = "Could not find a registered artifact repository"
NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
)


def is_permanent(error: BaseException) -> bool:
    """Whether a request or upload would fail again.

    Examples: a missing module, no permission, no such bucket, directory or run, a read-only
    directory. In a chain of errors the outermost one with a clear cause decides.
    """
    verdicts = (_verdict(cause) for cause in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def is_unknown_store(error: BaseException) -> bool:
    """Whether MLflow does not know this kind of artifact store: its plugin is not installed."""
    return NO_STORE in str(error)


def _verdict(error: BaseException) -> bool | None:
    """Whether an error is permanent; None if it is not clear."""
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
    """The HTTP status of an error of MLflow, requests, botocore, Google or Azure; None if none."""
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        http_status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        http_status = getattr(answer, "status_code", None)
    for status in (http_status, getattr(error, "status_code", None), getattr(error, "code", None)):
        if isinstance(status, int):
            return int(status)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
