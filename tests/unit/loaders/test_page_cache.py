"""Files leave the page cache, and copies on a RAM disk leave memory."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.loaders.page_cache import RAM_DISK, evict, ram_disk, read_ahead_kb, resident_share


def file_of(path: Path, size: int = 1 << 20) -> Path:
    path.write_bytes(bytes(range(256)) * (size // 256))
    return path


def test_a_file_that_was_just_written_is_resident_until_it_is_evicted(tmp_path: Path) -> None:
    files = [file_of(tmp_path / "a"), file_of(tmp_path / "b"), file_of(tmp_path / "empty", 0)]
    assert resident_share(files) == 1
    evict(files)
    assert resident_share(files) < 0.01
    files[0].read_bytes()
    assert 0.3 < resident_share(files) < 0.7


def test_a_file_that_is_mapped_is_not_measured_cold(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) >= 0
        with pytest.raises(UsageError, match="100% of the pages"):
            evict([path])


def test_the_disk_of_a_file_says_how_far_it_reads_ahead(tmp_path: Path) -> None:
    found = read_ahead_kb(tmp_path)
    assert found is None or found >= 0


def test_a_ram_disk_has_the_files_and_is_removed(tmp_path: Path) -> None:
    before = set(RAM_DISK.iterdir())
    directory = tmp_path / "store"
    (directory / "inner").mkdir(parents=True)
    file_of(directory / "inner" / "a")
    with ram_disk(directory) as copy:
        assert copy.is_relative_to(RAM_DISK)
        assert (copy / "inner" / "a").read_bytes() == (directory / "inner" / "a").read_bytes()
    with pytest.raises(KeyboardInterrupt), ram_disk(directory):
        raise KeyboardInterrupt
    assert set(RAM_DISK.iterdir()) == before


def test_a_ram_disk_that_is_too_small_is_an_error_with_both_sizes(tmp_path: Path) -> None:
    before = set(RAM_DISK.iterdir())
    directory = tmp_path / "store"
    directory.mkdir()
    with (directory / "sparse").open("wb") as file:
        file.truncate(10**13)
    message = r"takes 10,000,000 MB and [0-9,]+ MB are free"
    with pytest.raises(UsageError, match=message), ram_disk(directory):
        pass
    with pytest.raises(UsageError, match="no such directory"), ram_disk(directory, tmp_path / "x"):
        pass
    assert set(RAM_DISK.iterdir()) == before


def test_the_copy_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    file_of(directory / "a")
    parent = tmp_path / "memory"
    parent.mkdir()
    script = f"""
import os, signal
from pathlib import Path
from mlflow_dr.loaders.page_cache import ram_disk
with ram_disk(Path({str(directory)!r}), Path({str(parent)!r})) as copy:
    assert (copy / "a").exists()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert list(parent.iterdir())
    with ram_disk(directory, parent):
        pass
    assert not list(parent.iterdir())
