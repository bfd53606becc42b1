"""Files of a checkpoint, by its manifest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
    monkeypatch.setattr(fetching, "_local", lambda location: None)


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


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_a_file_elsewhere(directory: Path, name: str) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_manifest(directory, file_sha256(path))
