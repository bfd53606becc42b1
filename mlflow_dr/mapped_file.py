"""Files that are mapped into memory and read at random."""

from __future__ import annotations

import mmap
from pathlib import Path

READ_AT_ONCE = 1 << 17
"""Bytes of one request for pages; the kernel cuts longer ones, on a disk of the usual settings."""


class MappedFile:
    """A file's bytes, mapped for reading.

    Around a page that is not in the page cache, the kernel reads up to megabytes more, so that
    reading a few documents reads the whole file. With `at_random` it reads that page alone; call
    `prefetch` before a longer part is read in order.

    Args:
        path: the file.
        at_random: whether a page is read alone.

    Attributes:
        data: the bytes; a buffer that numpy and pyarrow take as it is.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, at_random: bool = True) -> None:
        self.data: mmap.mmap | bytes = b""
        with path.open("rb") as file:
            if path.stat().st_size:  # an empty file cannot be mapped
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if at_random:
            self._advise("MADV_RANDOM", 0, len(self.data))

    def prefetch(self, start: int, stop: int) -> None:
        """Have the kernel read a part in the background; nothing is read that is in memory."""
        for first in range(start - start % READ_AT_ONCE, stop, READ_AT_ONCE):
            self._advise("MADV_WILLNEED", first, min(READ_AT_ONCE, len(self.data) - first))

    def _advise(self, name: str, start: int, length: int) -> None:
        if hasattr(mmap, name) and isinstance(self.data, mmap.mmap):  # not on Windows
            self.data.madvise(getattr(mmap, name), start, length)
