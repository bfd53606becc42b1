"""Passages end to end in one file, and where each one starts in another."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mlflow_dr.collection.corpus import ROWS_PER_BATCH, Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.stores.base import STORES, DocumentStore
from mlflow_dr.stores.records import (
    map_offsets,
    passage_of,
    read_separator,
    write_end_to_end,
    write_records,
)

DOCUMENTS = "documents"
_new = tuple.__new__


class MappedRecords:
    """The files of a lookup, mapped.

    Args:
        directory: the folder.
    """

    def __init__(self, directory: Path) -> None:
        self._documents = MappedFile(directory / DOCUMENTS)
        self._offsets = map_offsets(directory, DOCUMENTS)
        self._separator = read_separator(directory)

    def read(self, rows: np.ndarray) -> list[Passage]:
        """The passages at some rows."""
        data, separator, offsets = self._documents.data, self._separator, self._offsets
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        # `passage_of`, without a call for each
        return [
            _new(Passage, (*data[start:end].decode().split(separator, 2), None))
            for start, end in zip(starts, ends, strict=True)
        ]

    def batches(self) -> Iterator[list[Passage]]:
        """All passages, a few thousand at a time."""
        for first in range(0, len(self._offsets) - 1, ROWS_PER_BATCH):
            rows = np.arange(first, min(first + ROWS_PER_BATCH, len(self._offsets) - 1))
            self._documents.prefetch(int(self._offsets[first]), int(self._offsets[rows[-1] + 1]))
            yield self.read(rows)


class ReadRecords:
    """The files of a lookup, of which the documents are read by system calls.

    Args:
        directory: the folder.
    """

    def __init__(self, directory: Path) -> None:
        self._offsets = map_offsets(directory, DOCUMENTS)
        self._separator = read_separator(directory)
        self._descriptor = os.open(directory / DOCUMENTS, os.O_RDONLY)
        # also closed with the object itself
        self.close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, rows: np.ndarray) -> list[Passage]:
        """The passages at some rows."""
        descriptor = self._descriptor
        starts, ends = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist()
        return [
            passage_of(os.pread(descriptor, end - start, start), self._separator)
            for start, end in zip(starts, ends, strict=True)
        ]


class Lookup(DocumentStore):
    """Documents and where they start, however they are read."""

    files_of = "lookup"

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the documents end to end."""
        write_records(corpus, directory, partial(write_end_to_end, directory, DOCUMENTS))


@STORES.register("lookup")
@STORES.register("lookup:mmap")
class LookupStore(Lookup):
    """Passages in a mapped file: a passage is read by one or two page faults, or from memory."""

    def open_files(self) -> MappedRecords:
        """Map the files."""
        return MappedRecords(self.directory)

    def read(self, opened: MappedRecords, rows: np.ndarray) -> list[Passage]:
        """Slices of the mapped file."""
        return opened.read(rows)


@STORES.register("lookup:pread")
class ReadingLookupStore(Lookup):
    """The files of `LookupStore`, read by a system call for each passage (`pread`)."""

    def open_files(self) -> ReadRecords:
        """Open the documents, and map the offsets."""
        return ReadRecords(self.directory)

    def read(self, opened: ReadRecords, rows: np.ndarray) -> list[Passage]:
        """A system call for each passage."""
        return opened.read(rows)


@STORES.register("memory")
class MemoryStore(Lookup):
    """All passages as objects in memory, read from the files of `LookupStore` when it is opened.

    Forked processes share the objects, and copy the pages whose reference counts they change.
    """

    open_after_fork = True

    def open_files(self) -> list[Passage]:
        """Read all passages, in a thread, because malloc gives threads memory of their own.

        What reading leaves free between a million passages would otherwise be used by everything
        that the main thread does later. Tokenising then takes a quarter longer.
        """
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._all).result()

    def _all(self) -> list[Passage]:
        batches = MappedRecords(self.directory).batches()
        return [passage for passages in batches for passage in passages]

    def read(self, opened: list[Passage], rows: np.ndarray) -> list[Passage]:
        """Items of a list."""
        return [opened[row] for row in rows.tolist()]
