"""What is tried again, and for how long."""

import json
from collections.abc import Callable, Iterator

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mlflow_dr.errors import RunGoneError, TrackingError
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.server import TRIES, Patience

PAGE = "<html>Please log in.</html>"


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def with_patience(client: MlflowClient, slept: list[float]) -> Patience:
    return Patience(client, 1.0, slept.append)


def failing(errors: Iterator[Exception]) -> Callable[[], str]:
    """A function that raises these errors one after the other and then returns its answer."""

    def act() -> str:
        with tracking_errors("asking"):
            for error in errors:
                raise error
        return "answer"

    return act


def no_json() -> Exception:
    """The error that MLflow's client raises for a login page instead of JSON."""
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(PAGE)
    return caught.value


def test_malformed_answers_are_requested_again_with_growing_waits(
    with_patience: Patience, slept: list[float]
) -> None:
    errors = [no_json(), KeyError("run"), MlflowException("cut"), ConnectionError("cut"), no_json()]
    assert with_patience(failing(iter(errors))) == "answer"
    assert slept == [1, 2, 4, 8]


def test_a_failed_request_does_not_mean_that_the_model_is_gone(
    client: MlflowClient, with_patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow reports every failed request for a model, before it is tagged, as "no such model"."""
    asked: list[str] = []

    def lost(model_id: str) -> None:
        asked.append(model_id)
        raise no_json()

    def tag() -> None:
        with tracking_errors("tagging"):
            client.set_logged_model_tags("m-1", {"a": "b"})

    monkeypatch.setattr(client._tracking_client, "get_logged_model", lost)
    with pytest.raises(TrackingError, match="may have been deleted"):
        with_patience(tag)
    assert asked.count("m-1") == TRIES  # a publisher of another test may still ask, too


def test_the_error_is_raised_after_the_last_try(
    with_patience: Patience, slept: list[float]
) -> None:
    errors = [no_json() for _ in range(TRIES + 1)]
    with pytest.raises(TrackingError, match="asking: Expecting value"):
        with_patience(failing(iter(errors)))
    assert slept == [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize(
    "error", [MlflowException("no", INVALID_PARAMETER_VALUE), RunGoneError("deleted")], ids=repr
)
def test_a_refused_request_is_repeated_once(
    with_patience: Patience, slept: list[float], error: Exception
) -> None:
    assert with_patience(failing(iter([error]))) == "answer"
    with pytest.raises(TrackingError):
        with_patience(failing(iter([error, error])))
    assert slept == []


def test_out_of_memory_is_not_a_server_error(with_patience: Patience) -> None:
    with pytest.raises(MemoryError):
        with_patience(failing(iter([MemoryError()])))
