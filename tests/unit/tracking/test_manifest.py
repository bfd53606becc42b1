import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.errors import CheckpointError
from mlflow_dr.files import file_sha256
from mlflow_dr.tracking.manifest import (
    MANIFEST,
    link_listed_files,
    read_manifest,
    unlisted_files,
    verify_files,
    write_manifest,
)

ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def verify(directory: Path, digest: str) -> None:
    verify_files(directory, read_manifest(directory, digest))


def test_a_complete_directory_is_accepted_and_may_hold_more(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "README.md").write_text("added by hand")
    verify(directory, digest)


def test_writing_a_manifest_again_gives_the_same_digest(directory: Path) -> None:
    assert write_manifest(directory) == write_manifest(directory)


def test_a_missing_file_is_named(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "1_Pooling" / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"manifest\.json lists 1_Pooling/config\.json, which is missing"
    ):
        verify(directory, digest)


def test_a_truncated_file_is_named_with_both_sizes(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"weig")
    with pytest.raises(CheckpointError, match=r"model.safetensors has 4 bytes, but 7"):
        verify(directory, digest)


def test_a_flipped_byte_is_found(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(directory, digest)


def test_a_manifest_that_was_changed_too_is_found(directory: Path) -> None:
    digest = write_manifest(directory)
    (directory / "model.safetensors").write_bytes(b"other")
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(directory, digest)


def test_a_missing_manifest_means_incomplete(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="not published completely"):
        verify(directory, "0" * 64)


@pytest.mark.parametrize(
    "files",
    [
        *([], {}, 7, None, "text", [ENTRY]),
        *({"a": None}, {"a": 7}, {"a": {}}, {"a": [1, "0" * 64]}),
        *({"a": {**ENTRY, "bytes": -1}}, {"a": {**ENTRY, "bytes": True}}),
        *({"a": {**ENTRY, "bytes": "1"}}, {"a": {**ENTRY, "bytes": 1.5}}),
        *({"a": {**ENTRY, "sha256": None}}, {"a": {**ENTRY, "sha256": "0" * 63}}),
        *({"": ENTRY}, {".": ENTRY}, {"a/": ENTRY}, {"./a": ENTRY}, {"a//b": ENTRY}),
        *({"a\0b": ENTRY}, {"\ud800": ENTRY}, {"a" * 256: ENTRY}, {MANIFEST: ENTRY}),
        {"a": ENTRY, "a/b": ENTRY},
    ],
    ids=lambda files: repr(files)[:30],
)
def test_a_malformed_manifest_is_refused_on_one_line(tmp_path: Path, files: Any) -> None:
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=MANIFEST) as caught:
        read_manifest(tmp_path, file_sha256(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"\xff": {}}'],
    ids=len,
)
def test_a_manifest_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is malformed"):
        read_manifest(tmp_path, None)


def test_a_view_has_the_listed_files_only(directory: Path, tmp_path: Path) -> None:
    write_manifest(directory)
    listed = read_manifest(directory, None)
    assert unlisted_files(directory, listed) == []
    (directory / "query").mkdir()
    (directory / "1_Pooling" / "added.json").write_text("{}")
    assert unlisted_files(directory, listed) == ["1_Pooling/added.json", "query"]
    view = link_listed_files(directory, listed, tmp_path / "view")
    names = {path.relative_to(view).as_posix() for path in view.rglob("*")}
    assert names == {MANIFEST, "model.safetensors", "1_Pooling", "1_Pooling/config.json"}
    assert (view / "model.safetensors").read_bytes() == b"weights"
