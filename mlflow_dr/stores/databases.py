"""Passages in an LMDB database (extra `lmdb`) or a Lance dataset (extra `lance`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import MissingExtraError, UsageError
from mlflow_dr.stores.base import STORES, DocumentStore
from mlflow_dr.stores.records import Batches, passage_of, read_separator, write_records

DATABASE = "data.mdb"
MAP_SIZE = 1 << 40
"""Bytes of address space for writing a database; its file takes what it needs."""
DATASET = "passages.lance"


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise MissingExtraError(
            'the document store lmdb needs a library: pip install "mlflow_dr[lmdb]"'
        ) from error
    return lmdb


def _lance() -> Any:
    try:
        import lance
    except ImportError as error:
        raise MissingExtraError(
            'the document store lance needs a library: pip install "mlflow_dr[lance]"'
        ) from error
    return lance


class _Environment:
    """A database that is open for reading."""

    def __init__(self, directory: Path) -> None:
        self._separator = read_separator(directory)
        self._environment = _lmdb().open(
            str(directory / DATABASE),
            subdir=False,
            readonly=True,
            lock=False,
            readahead=False,
            create=False,
        )

    def read(self, rows: np.ndarray) -> list[Passage]:
        with self._environment.begin(buffers=False) as transaction:
            records = [transaction.get(row.to_bytes(8, "big")) for row in rows.tolist()]
        return [passage_of(record, self._separator) for record in records]

    def close(self) -> None:
        self._environment.close()


@STORES.register("lmdb")
class LmdbStore(DocumentStore):
    """A B-tree in a mapped file; the key of a passage is its row."""

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the database in the order of its keys."""
        lmdb = _lmdb()

        def write(batches: Batches) -> None:
            (directory / DATABASE).unlink(missing_ok=True)
            file = str(directory / DATABASE)
            with lmdb.open(file, subdir=False, lock=False, map_size=MAP_SIZE) as environment:
                row = 0
                for records in batches:
                    with environment.begin(write=True) as transaction:
                        for record in records:
                            transaction.put(row.to_bytes(8, "big"), record, append=True)
                            row += 1

        write_records(corpus, directory, write)

    def open_files(self) -> _Environment:
        """Open the database for reading."""
        return _Environment(self.directory)

    def read(self, opened: _Environment, rows: np.ndarray) -> list[Passage]:
        """A search in the tree for each passage."""
        return opened.read(rows)


@STORES.register("lance")
class LanceStore(DocumentStore):
    """A Lance dataset, read by `take`; it has threads, so forked processes cannot read it."""

    works_in_forks = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._made_in = os.getpid()

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the dataset."""

        def batches() -> Iterator[pa.RecordBatch]:
            for passages in corpus.batches():
                columns = list(zip(*passages, strict=True))[: len(SCHEMA)]
                yield pa.record_batch([pa.array(column) for column in columns], schema=SCHEMA)

        reader = pa.RecordBatchReader.from_batches(SCHEMA, batches())
        _lance().write_dataset(reader, str(directory / DATASET))

    def open_files(self) -> Any:
        """Open the dataset."""
        if os.getpid() != self._made_in:
            raise UsageError(
                "the document store lance cannot be read by forked processes; start workers by "
                "spawn or forkserver, or without workers read it in this process"
            )
        return _lance().dataset(str(self.directory / DATASET))

    def read(self, opened: Any, rows: np.ndarray) -> list[Passage]:
        """All passages by one request."""
        columns = opened.take(rows.tolist(), columns=SCHEMA.names).select(SCHEMA.names).columns
        return [*map(Passage, *(column.to_pylist() for column in columns))]
