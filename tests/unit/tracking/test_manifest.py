from pathlib import Path

import pytest

from mlflow_dr.errors import CheckpointError
from mlflow_dr.tracking.manifest import MANIFEST, verify_manifest, write_manifest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_whole_directory_is_accepted_and_may_hold_more(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "README.md").write_text("added by hand")
    verify_manifest(directory, digest)


def test_writing_it_again_gives_the_same_digest(directory: Path) -> None:
    assert write_manifest(directory) == write_manifest(directory)


def test_a_missing_file_is_named(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json is missing"):
        verify_manifest(directory, digest)


def test_a_truncated_file_is_named_with_both_sizes(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"weig")
    with pytest.raises(CheckpointError, match=r"model.safetensors has 4 bytes, but 7"):
        verify_manifest(directory, digest)


def test_a_flipped_byte_is_found(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_manifest(directory, digest)


def test_a_manifest_that_was_changed_too_is_found(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"other")
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_manifest(directory, digest)


def test_no_manifest_means_not_whole(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="not published whole"):
        verify_manifest(directory, "0" * 64)
