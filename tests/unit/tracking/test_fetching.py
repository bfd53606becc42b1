"""Files of a checkpoint, by its manifest."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.errors import CheckpointError, LostError, UnavailableError
from mlflow_dr.files import file_sha256
from mlflow_dr.tracking import fetching
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
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
def on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is on another machine."""
    monkeypatch.setattr(fetching, "local_directory", lambda location: None)


def names(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }


def test_the_files_of_an_encoder_or_all_files_are_fetched(
    run: TrackedRun, directory: Path, on_another_machine: None, tmp_path: Path
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    with fetching.checkpoint_files(checkpoint) as found:
        assert names(found) == {"manifest.json", "weights", "1_Pooling/config.json"}
    assert not found.exists()
    fetching.download(checkpoint, tmp_path / "whole")
    assert names(tmp_path / "whole") == names(directory)


@pytest.mark.parametrize("lost", ["weights", "manifest.json"])
def test_a_missing_file_is_named(
    run: TrackedRun, directory: Path, on_another_machine: None, lost: str
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    (Path(checkpoint.location.removeprefix("file://")) / lost).unlink()
    message = f"cannot be downloaded: .*{lost}"
    with pytest.raises(UnavailableError, match=message), fetching.checkpoint_files(checkpoint):
        pass


class ObjectStoreError(Exception):
    """As botocore's, of no kind that others share."""


def test_an_error_of_an_object_store(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)

    def refused(*_: object) -> None:
        raise ObjectStoreError("could not connect to\nthe endpoint")

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", refused)
    message = "cannot be downloaded: could not connect to the endpoint"
    with pytest.raises(UnavailableError, match=message), fetching.checkpoint_files(checkpoint):
        pass


def test_ctrl_c_does_not_wait_for_the_files_under_way(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    released, real = threading.Event(), LocalArtifactRepository._download_file

    def slow(self: LocalArtifactRepository, name: str, path: str) -> None:
        if name == "weights":
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
            released.wait(300)
        real(self, name, path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", slow)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), fetching.checkpoint_files(checkpoint):
        pass
    released.set()
    assert time.monotonic() - start < 120


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_a_file_elsewhere(directory: Path, name: str) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_manifest(directory, file_sha256(path))


PAGE = b"<!DOCTYPE html><html>Please log in.</html>"


def directory_of(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.location.removeprefix("file://"))


def test_only_listed_files_of_a_local_store_are_used(
    run: TrackedRun, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    with fetching.checkpoint_files(checkpoint) as found:
        assert found == directory_of(checkpoint)
    (directory_of(checkpoint) / "query").mkdir()
    (directory_of(checkpoint) / "query" / "config.json").write_text("{}")
    (directory_of(checkpoint) / "special_tokens_map.json").write_text("{}")
    with fetching.checkpoint_files(checkpoint) as found:
        assert names(found) == names(directory)
        assert (found / "weights").read_text() == "1"
    assert not found.exists()
    assert "not in its manifest and are not used: query/config.json, special" in caplog.text
    fetching.download(checkpoint, tmp_path / "whole")
    assert names(tmp_path / "whole") == names(directory)
    assert not (tmp_path / "whole" / "weights").is_symlink()


def test_a_download_with_other_bytes_is_repeated(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login page with status 200 for each file, and an answer that is cut."""
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    real, asked = LocalArtifactRepository._download_file, []

    def disturbed(self: LocalArtifactRepository, name: str, path: str) -> None:
        if checkpoint.model_id not in self.artifact_uri:  # a download that another test gave up
            return real(self, name, path)
        asked.append(name)
        number = asked.count(name)
        if number == 1:
            Path(path).write_bytes(PAGE)
        elif number == 2:
            raise ConnectionError("broken off")
        else:
            real(self, name, path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", disturbed)
    with fetching.checkpoint_files(checkpoint) as found:
        assert (found / "weights").read_text() == "1"
    assert asked.count("weights") == asked.count("manifest.json") == 3


def test_a_login_page_instead_of_files_does_not_fail_the_checkpoint(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)

    def page(self: LocalArtifactRepository, name: str, path: str) -> None:
        Path(path).write_bytes(PAGE)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", page)
    with (
        pytest.raises(UnavailableError, match="has other bytes at each download"),
        fetching.checkpoint_files(checkpoint),
    ):
        pass


def test_varying_bytes_do_not_fail_the_checkpoint(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    real, asked = LocalArtifactRepository._download_file, []

    def flipped(self: LocalArtifactRepository, name: str, path: str) -> None:
        real(self, name, path)
        if name == "weights":
            asked.append(name)
            Path(path).write_text(str(1 + len(asked)))

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", flipped)
    with (
        pytest.raises(UnavailableError, match="weights has other bytes"),
        fetching.checkpoint_files(checkpoint),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "says"),
    [("weights", "weights has 5 bytes, but 1 were published"), ("manifest.json", "not the one")],
)
def test_a_store_that_has_other_bytes(
    run: TrackedRun, directory: Path, on_another_machine: None, name: str, says: str
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    (directory_of(checkpoint) / name).write_text("other")
    with (
        pytest.raises(CheckpointError, match=says) as caught,
        fetching.checkpoint_files(checkpoint),
    ):
        pass
    assert not isinstance(caught.value, UnavailableError)


def test_missing_files_and_a_missing_store(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    (directory_of(checkpoint) / "weights").unlink()
    with pytest.raises(LostError, match="weights"), fetching.checkpoint_files(checkpoint):
        pass
    monkeypatch.undo()  # the store is on this machine
    shutil.rmtree(directory_of(checkpoint))
    with pytest.raises(LostError, match="no directory"), fetching.checkpoint_files(checkpoint):
        pass
    other = replace(checkpoint, location="/no/such/mount/models/m-1/artifacts")
    with pytest.raises(UnavailableError) as caught, fetching.checkpoint_files(other):
        pass
    assert not isinstance(caught.value, LostError)


def test_a_missing_plugin_of_the_store_is_not_retried(run: TrackedRun, directory: Path) -> None:
    publish(run, directory, 1)
    checkpoint = replace(run_checkpoints(run)[0], location="nostore://bucket/m-1/artifacts")
    with (
        pytest.raises(UnavailableError, match="nostore") as caught,
        fetching.checkpoint_files(checkpoint),
    ):
        pass
    assert caught.value.lasting


def test_a_missing_module_is_not_retried(
    run: TrackedRun, directory: Path, on_another_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, directory, 1)
    (checkpoint,) = run_checkpoints(run)
    asked: list[str] = []

    def without(self: LocalArtifactRepository, name: str, path: str) -> None:
        asked.append(name)
        import no_such_sdk  # type: ignore[import-not-found]  # noqa: F401

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", without)
    message = "no_such_sdk"
    with (
        pytest.raises(UnavailableError, match=message) as caught,
        fetching.checkpoint_files(checkpoint),
    ):
        pass
    assert caught.value.lasting
    assert len(asked) == 1
