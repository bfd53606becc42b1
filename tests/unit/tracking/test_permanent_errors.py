"""Which faults of a server or store another try will not mend."""

import errno

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from mlflow_dr.tracking.client import is_permanent


def answered(status: int) -> requests.HTTPError:
    """The error of requests for an answer of the artifact store."""
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError("no", response=answer)


class ClientError(Exception):
    """As botocore has it."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class NoCredentialsError(Exception):
    """As botocore has it, by name."""


class ForbiddenError(Exception):
    """As Google's client has it."""

    code = 403


def wrapped(cause: Exception) -> MlflowException:
    error = MlflowException("the upload failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'boto3'"),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.EROFS, "read-only file system"),
        NotADirectoryError(errno.ENOTDIR, "no"),
        RestException({"error_code": "PERMISSION_DENIED", "message": "no"}),
        RestException({"error_code": "UNAUTHENTICATED", "message": "no"}),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}),
        MlflowException("Could not find a registered artifact repository for: foo://x"),
        answered(401),
        answered(403),
        answered(404),
        ClientError("NoSuchBucket", 404),
        ClientError("AccessDenied", 403),
        NoCredentialsError("Unable to locate credentials"),
        ForbiddenError(),
        wrapped(ClientError("NoSuchBucket", 404)),
        wrapped(ModuleNotFoundError("No module named 'google'")),
    ],
    ids=repr,
)
def test_permanent_errors(error: Exception) -> None:
    assert is_permanent(error)


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("no route to host"),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "no"}),
        RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "no"}),
        answered(429),
        answered(502),
        ClientError("SlowDown", 503),
        ConnectionResetError(errno.ECONNRESET, "no"),
        OSError(errno.ENOSPC, "no space left on device"),
        requests.ConnectionError("Connection aborted"),
        TimeoutError("timed out"),
        wrapped(ConnectionRefusedError(errno.ECONNREFUSED, "no")),
        ValueError("whatever"),
    ],
    ids=repr,
)
def test_temporary_errors(error: Exception) -> None:
    assert not is_permanent(error)


def test_the_outermost_error_that_is_clear_decides() -> None:
    """A connection that broke while a refusal was dealt with is a broken connection."""
    error = ConnectionResetError(errno.ECONNRESET, "no")
    error.__context__ = answered(403)
    assert not is_permanent(error)
