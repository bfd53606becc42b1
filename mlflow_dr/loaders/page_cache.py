"""The page cache and the RAM disk: files read from disk anew, or held in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlflow_dr.errors import UsageError
from mlflow_dr.files import is_full, scratch

RAM_DISK = Path("/dev/shm")
MOST_RESIDENT = 0.01
"""The share of the pages of evicted files that may still be in memory."""


def evict(files: Sequence[Path]) -> None:
    """Remove files from the page cache, so that they are read from disk anew.

    Args:
        files: complete files; what is not on disk yet is written first.

    Raises:
        UsageError: more than 1 % of their pages stay in memory.
    """
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    share = resident_share(files)
    if share > MOST_RESIDENT:
        raise UsageError(
            f"cannot measure with a cold page cache: {share:.0%} of the pages of {files[0].parent} "
            "stay in memory. They do if another process maps the files, if they are on a RAM disk, "
            "and if they are another user's. End such processes, or measure with a warm cache"
        )


def resident_share(files: Sequence[Path]) -> float:
    """The share of the pages of files that is in memory, from 0 to 1."""
    pages = resident = 0
    for path in files:
        found = _resident_pages(path)
        pages += len(found)
        resident += int(found.sum())
    return resident / max(pages, 1)


def _resident_pages(path: Path) -> np.ndarray:
    """Whether each page of a file is in memory, `(n_pages,) uint8`, 1 or 0."""
    size = path.stat().st_size
    found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    if not size:
        return found
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)  # gives the address of the mapping
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(found.ctypes.data),
        )
        del view  # a mapping that is in use cannot be closed
        if failed:
            number = ctypes.get_errno()
            raise UsageError(
                f"{path}: the system does not say which pages are in memory ({os.strerror(number)})"
            )
    return found & 1


def read_ahead_kb(path: Path) -> float | None:
    """How far ahead the kernel reads on the device of a file, in KiB; None where it has no device.

    Args:
        path: a file or directory.
    """
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = Path("/sys/dev/block", number).resolve()
    settings = (
        block / "queue" / "read_ahead_kb",
        block.parent / "queue" / "read_ahead_kb",  # of a partition's disk
        Path("/sys/class/bdi", number, "read_ahead_kb"),  # of a network's or joined file system
    )
    for setting in settings:
        if setting.is_file():
            return float(setting.read_text())
    return None


@contextmanager
def ram_disk(directory: Path, parent: Path = RAM_DISK) -> Iterator[Path]:
    """A copy of a directory in memory, which is removed when the block ends.

    Copies of processes that were killed are removed first.

    Args:
        directory: what is copied.
        parent: a folder whose files are in memory.

    Raises:
        UsageError: there is no such folder, or too little memory is free.
    """
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such directory; a RAM disk needs it")
    with scratch(parent) as copy:
        needed = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        free = min(shutil.disk_usage(parent).free, _available_memory())
        message = (
            f"{parent}: the RAM disk is too small; {directory} takes {needed / 1e6:,.0f} MB and "
            f"{free / 1e6:,.0f} MB are free"
        )
        if needed > free:
            raise UsageError(message)
        try:
            shutil.copytree(directory, copy)
        except OSError as error:
            if is_full(error, parent):
                raise UsageError(message) from error
            raise
        yield copy


def _available_memory() -> int:
    """Bytes of memory that can be used without swapping."""
    for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return shutil.disk_usage(RAM_DISK).free
