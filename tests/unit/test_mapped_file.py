"""Files that are mapped into memory."""

from pathlib import Path

import pytest

from mlflow_dr import mapped_file
from mlflow_dr.mapped_file import MappedFile


@pytest.mark.parametrize("at_random", [True, False])
def test_a_mapped_file_has_its_bytes(tmp_path: Path, at_random: bool) -> None:
    (tmp_path / "file").write_bytes(b"gull")
    assert MappedFile(tmp_path / "file", at_random).data[1:3] == b"ul"


def test_an_empty_file_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mapped = MappedFile(tmp_path / "file")
    mapped.prefetch(0, 0)
    assert mapped.data == b""


def test_any_part_can_be_prefetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "READ_AT_ONCE", 1 << 14)
    content = bytes(range(256)) * 200
    (tmp_path / "file").write_bytes(content)
    mapped = MappedFile(tmp_path / "file")
    for start, stop in ((0, len(content)), (5, 6), (len(content) - 1, len(content)), (7, 40_000)):
        mapped.prefetch(start, stop)
    assert mapped.data[:] == content
