"""Faults of a tracking server or artifact store that another try will not mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from mlflow.exceptions import MlflowException

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


def lasts(error: BaseException) -> bool:
    """Whether a request or upload would fail again: what it needs is missing, or it is refused.

    A missing module, no permission, no such bucket, place or run, a place that is read-only. Of
    errors that were raised from each other the outermost that is clear decides.
    """
    verdicts = (_verdict(one) for one in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def is_storeless(error: BaseException) -> bool:
    """Whether MLflow knows no artifact store of the URI's kind: its plugin is not installed."""
    return NO_STORE in str(error)


def _verdict(error: BaseException) -> bool | None:
    """Whether one error lasts; None where it does not say."""
    if isinstance(error, ImportError):
        return True
    if type(error).__name__ in NO_CREDENTIALS or is_storeless(error):
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
