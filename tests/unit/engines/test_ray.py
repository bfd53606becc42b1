"""What the Ray engine makes of answers and of errors; tests/contract has it at work."""

import pickle
import socket
from typing import Any

import pytest

from mlflow_dr.engines.ray import Greeting, RayEngine
from mlflow_dr.engines.worker import Answer
from mlflow_dr.errors import UnavailableError, UsageError
from mlflow_dr.version import VERSION

ray = pytest.importorskip("ray")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RayEngine:
    """An engine without a cluster."""
    engine = RayEngine.__new__(RayEngine)
    engine._ray, engine._dtype = ray, ""
    return engine


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(reference: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)


def test_another_version_on_a_node_is_refused(engine: RayEngine) -> None:
    with pytest.raises(UsageError, match=rf"node n7 has mlflow_dr 0\.0\.1, .* {VERSION}"):
        engine.greet(Answer(Greeting("0.0.1", "n7", "fp32")))
    engine.greet(Answer(Greeting(VERSION, "n7", "bf16")))
    assert engine.resolve_dtype("auto") == "bf16"


def test_a_node_without_mlflow_dr_is_named_as_such(
    engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The actor died: ModuleNotFoundError: No module named 'mlflow_dr'"
    failing(monkeypatch, ray.exceptions.RaySystemError(text))
    with pytest.raises(UsageError, match="no module 'mlflow_dr'; install"):
        engine._received(None)


def test_a_dead_actor_is_lost(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ray.exceptions.NodeDiedError("n7 is gone"))
    assert "n7 is gone" in engine._received(None).reason


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ConnectionError("x"), UnavailableError, "if it has a token, set RAY_AUTH_MODE=token"),
        (ConnectionError("Could not find any running Ray instance."), UnavailableError, "no Ray"),
        (ray.exceptions.AuthenticationError("x"), UnavailableError, "set RAY_AUTH_MODE=token"),
        (RuntimeError("Version mismatch: Python"), UsageError, "Version mismatch"),
        (OSError("AF_UNIX path length"), UsageError, "set RAY_TMPDIR"),
    ],
)
def test_a_cluster_that_cannot_be_used(
    error: Exception, kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        assert options["address"] == "ray://h:1"
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "ray://h:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(kind, match=text) as raised:
        RayEngine()
    assert "\n" not in str(raised.value)


def test_an_address_where_nothing_listens_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"no Ray cluster at .*Connection refused"):
            RayEngine()


def test_a_greeting_travels() -> None:
    answer = Answer(Greeting(VERSION, "n7", "fp32"))
    assert pickle.loads(pickle.dumps(answer)) == answer
