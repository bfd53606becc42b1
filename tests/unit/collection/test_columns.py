"""Strings of a record batch by offsets."""

import pyarrow as pa
import pytest

from mlflow_dr.collection.columns import extent, strings

VALUES = ["", "gull", "", "naïve 東京", "a\0b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize(("start", "length"), [(0, 5), (1, 3), (4, 1)])
def test_strings_are_found_in_a_part_of_an_array(
    kind: pa.DataType, start: int, length: int
) -> None:
    found = strings(pa.array(VALUES, kind).slice(start, length))
    assert [
        str(found.data[a:b], "utf-8")
        for a, b in zip(found.offsets, found.offsets[1:], strict=False)
    ] == VALUES[start : start + length]


def test_a_column_of_empty_strings_has_no_data() -> None:
    found = strings(pa.array(["", ""]))
    assert (list(found.offsets), len(found.data)) == ([0, 0, 0], 0)


def test_the_extent_is_from_the_first_byte_to_the_last() -> None:
    memory = pa.py_buffer(bytes(12) + b"abcdefgh")
    array = pa.Array.from_buffers(pa.string(), 2, [None, memory.slice(0, 12), memory.slice(12, 8)])
    assert extent([array]) == (memory.address, memory.address + 20)
