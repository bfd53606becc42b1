"""Files of a checkpoint, by its manifest."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.errors import CheckpointError, UnavailableError
from mlflow_dr.files import file_sha256
from mlflow_dr.tracking import fetching
from mlflow_dr.tracking.checkpoints import checkpoints_of, publish
from mlflow_dr.tracking.manifest import read_manifest
from mlflow_dr.tracking.runs import TrackedRun

Away = Callable[[], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "published" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "published" / "weights").write_text("1")
    (tmp_path / "published" / "1_Pooling" / "config.json").write_text("{}")
    return tmp_path / "published"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is on another machine."""
    monkeypatch.setattr(fetching, "local_directory", lambda location: None)


def names(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }


def test_what_an_encoder_needs_or_everything(
    run: TrackedRun, directory: Path, elsewhere: None, tmp_path: Path
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = checkpoints_of(run)
    with fetching.fetched(checkpoint) as found:
        assert names(found) == {"manifest.json", "weights", "1_Pooling/config.json"}
    assert not found.exists()
    fetching.download(checkpoint, tmp_path / "whole")
    assert names(tmp_path / "whole") == names(directory)


@pytest.mark.parametrize("lost", ["weights", "manifest.json"])
def test_a_file_that_is_not_there(
    run: TrackedRun, directory: Path, elsewhere: None, lost: str
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = checkpoints_of(run)
    (Path(checkpoint.location.removeprefix("file://")) / lost).unlink()
    message = f"cannot be downloaded: .*{lost}"
    with pytest.raises(UnavailableError, match=message), fetching.fetched(checkpoint):
        pass


class ObjectStoreError(Exception):
    """As botocore's, of no kind that others share."""


def test_an_error_of_an_object_store(
    run: TrackedRun, directory: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = checkpoints_of(run)

    def refused(*_: object) -> None:
        raise ObjectStoreError("could not connect to\nthe endpoint")

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", refused)
    message = "cannot be downloaded: could not connect to the endpoint"
    with pytest.raises(UnavailableError, match=message), fetching.fetched(checkpoint):
        pass


def test_ctrl_c_does_not_wait_for_the_files_under_way(
    run: TrackedRun, directory: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = checkpoints_of(run)
    released, real = threading.Event(), LocalArtifactRepository._download_file

    def slow(self: LocalArtifactRepository, name: str, path: str) -> None:
        if name == "weights":
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
            released.wait(20)
        real(self, name, path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", slow)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), fetching.fetched(checkpoint):
        pass
    released.set()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_a_file_elsewhere(directory: Path, name: str) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_manifest(directory, file_sha256(path))
