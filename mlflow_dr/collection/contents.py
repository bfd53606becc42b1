"""Digests of Arrow tables that depend on what they hold, never on how it is cut into batches."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.files import digest_of

ITEMS = "[]"


class ContentDigest:
    """SHA-256 over the lengths and the bytes of each column.

    Args:
        schema: columns of strings, numbers, or lists of either, without nulls.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._columns = schema.names
        names = [name for field in schema for name in _streams(field.name, field.type)]
        self._lengths = {name: hashlib.sha256() for name in names}
        self._bytes = {name: hashlib.sha256() for name in names}

    def update(self, batch: pa.RecordBatch) -> None:
        """Take in the next rows."""
        for name in self._columns:
            self._update(name, batch.column(name))

    def hexdigest(self) -> str:
        """The digest so far, 16 hexadecimal characters."""
        parts = [h.hexdigest() for h in (*self._lengths.values(), *self._bytes.values())]
        return digest_of(*parts)

    def _update(self, name: str, column: pa.Array) -> None:
        if pa.types.is_list(column.type):
            self._lengths[name].update(_plain(pc.list_value_length(column), "<i8"))
            self._update(name + ITEMS, column.flatten())
        elif pa.types.is_string(column.type):
            self._lengths[name].update(_plain(pc.binary_length(column), "<i8"))
            self._bytes[name].update("".join(column.to_pylist()).encode())
        else:
            wide = "<f8" if pa.types.is_floating(column.type) else "<i8"
            self._bytes[name].update(_plain(column, wide))


def _streams(name: str, kind: pa.DataType) -> list[str]:
    """The name of a column, and of the items of its lists."""
    inner = _streams(name + ITEMS, kind.value_type) if pa.types.is_list(kind) else []
    return [name, *inner]


def _plain(numbers: pa.Array, dtype: str) -> bytes:
    return numbers.to_numpy(zero_copy_only=False).astype(dtype).tobytes()
