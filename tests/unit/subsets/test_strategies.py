"""What the tops of an encoder are known by in the cache."""

import os
from pathlib import Path

import pytest

from mlflow_dr.subsets.strategies import _file_digests


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "vocab.txt", "spiece.model", "1_Dense/model.bin"]
)
def test_the_files_of_an_encoder_are_known_by_their_contents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
    before, state = _file_digests(tmp_path), path.stat()
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert _file_digests(tmp_path) != before
