"""The ids of a corpus in a file, for stores that are read by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.columns import strings
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.mapped_file import MappedFile

IDS_PER_BATCH = 1 << 16


def write_ids(corpus: Corpus, path: Path) -> None:
    """Write the ids of a corpus, in order."""
    table = pa.table({"id": corpus.ids})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table, max_chunksize=IDS_PER_BATCH)


def rows_in_file(ids: Sequence[str], path: Path) -> np.ndarray:
    """The rows of some ids, `(len(ids),) int64`; -1 for an id that the file does not have."""
    wanted = pa.array(ids, pa.string()).dictionary_encode()
    with pa.memory_map(str(path)) as source:
        stored = pa.ipc.open_file(source).read_all()["id"]
        places = pc.index_in(stored, value_set=wanted.dictionary)
        rows = pc.indices_nonzero(pc.is_valid(places)).to_numpy().astype(np.int64)
        found = np.full(len(wanted.dictionary), -1, np.int64)
        found[places.drop_null().to_numpy()] = rows
    return found[wanted.indices.to_numpy()]


class MappedIds:
    """The ids in a file of `write_ids`, mapped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        source = pa.BufferReader(pa.py_buffer(MappedFile(path).data))
        chunks = pa.ipc.open_file(source).read_all()["id"].chunks
        self._strings = [strings(chunk) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])

    def get_many(self, rows: np.ndarray) -> list[str]:
        """The ids at some rows, in this order."""
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        ids = []
        places = (rows - self._starts[chunks]).tolist()
        for chunk, place in zip(chunks.tolist(), places, strict=True):
            offsets, data = self._strings[chunk]
            ids.append(str(data[offsets[place] : offsets[place + 1]], "utf-8"))
        return ids
