"""Columns of an Arrow record batch, read by row without making an Arrow object for each value."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pyarrow as pa

OFFSET_FORMATS: dict[pa.DataType, tuple[Literal["i", "q"], int]] = {
    pa.string(): ("i", 4),
    pa.large_string(): ("q", 8),
}


class Strings(NamedTuple):
    """The strings of one array; string n is `str(data[offsets[n] : offsets[n + 1]], "utf-8")`.

    Attributes:
        offsets: where each string starts, and at last their end, `(n + 1,)`.
        data: UTF-8 bytes of the strings, end to end.
    """

    offsets: memoryview
    data: memoryview


def strings(array: pa.Array) -> Strings:
    """Views of the memory of an array of strings without nulls."""
    form, width = OFFSET_FORMATS[array.type]
    _, offsets, data = array.buffers()
    first, end = array.offset * width, (array.offset + len(array) + 1) * width
    return Strings(
        memoryview(offsets or bytes(width)).cast("B")[first:end].cast(form),
        memoryview(data or b"").cast("B"),
    )


def extent(arrays: list[pa.Array]) -> tuple[int, int]:
    """The addresses of the first byte of some arrays and of the one after their last byte."""
    # an empty buffer is anywhere
    buffers = [buffer for array in arrays for buffer in array.buffers() if buffer]
    return (
        min(buffer.address for buffer in buffers),
        max(buffer.address + buffer.size for buffer in buffers),
    )
