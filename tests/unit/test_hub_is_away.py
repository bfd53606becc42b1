"""A Hugging Face hub that does not answer holds nothing up."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_endpoint import HubEndpoint
from huggingface_hub import constants

from mlflow_dr import hub
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.tokenize import load_tokenizer
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.hub import hub_is_away


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hubs", {})


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub that takes connections and never answers, and an empty cache of it."""
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(hub, "SECONDS_WITH_NAMES", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield url


def test_a_hub_that_answers_is_not_away(hub_endpoint: HubEndpoint) -> None:
    assert not hub_is_away()
    hub_endpoint.close()
    assert not hub_is_away()  # it is asked once a minute


def test_a_silent_hub_is_named_once(
    silent_hub: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SECONDS_VALID", 0.0)
    for _ in range(2):
        assert hub_is_away()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"the Hugging Face hub ({silent_hub}) does not answer (")
    assert "HF_HUB_OFFLINE=1 saves the wait" in line


def test_a_hub_that_is_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_problem", lambda url: pytest.fail(url))
    assert hub_is_away()


def test_what_needs_a_silent_hub_fails_within_seconds(silent_hub: str) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError, match="hub cannot be reached, nor has its cache the model"):
        encoder_directory("org/encoder")
    with pytest.raises(UsageError, match="'org/encoder': no tokenizer in a directory"):
        load_tokenizer("org/encoder")
    with pytest.raises(DataError, match="the hub cannot be reached"):
        open_collection("org/data").corpus()
    assert time.monotonic() - start < 10
