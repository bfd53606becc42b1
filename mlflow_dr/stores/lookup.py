"""Passages end to end in one file, and their offsets in another: a read for each passage.

A passage is its id, title and text with a separator between them. The separator is a character that
is in no id and no title.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlflow_dr.collection.corpus import ROWS_PER_BATCH, Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.progress import progress_bar
from mlflow_dr.stores.base import STORES, DocumentStore

DOCUMENTS, OFFSETS, SEPARATOR = "documents", "offsets", "separator"
SEPARATORS = [chr(code) for code in range(32)]
_passage = tuple.__new__
"""`_passage(Passage, values)`: makes a passage in half the time of `Passage(*values)`."""


def write_records(corpus: Corpus, directory: Path, separator: str) -> bool:
    """Write documents and offsets.

    Returns:
        Whether they are complete; not if an id or title has the separator.
    """
    end = 0
    with (
        (directory / DOCUMENTS).open("wb") as documents,
        (directory / OFFSETS).open("wb") as offsets,
        progress_bar(len(corpus), "making the document store", "passages") as bar,
    ):
        offsets.write(np.zeros(1, "<i8").tobytes())
        for passages in corpus.batches():
            heads = [f"{id}{separator}{title}{separator}" for id, title, *_ in passages]
            if sum(head.count(separator) for head in heads) != 2 * len(heads):
                return False
            records = [
                (head + passage.text).encode()
                for head, passage in zip(heads, passages, strict=True)
            ]
            ends = end + np.cumsum([len(record) for record in records])
            documents.write(b"".join(records))
            offsets.write(ends.astype("<i8").tobytes())
            end = int(ends[-1])
            bar.update(len(passages))
    return True


class Records:
    """The files of a lookup, mapped.

    Args:
        directory: the folder.

    Attributes:
        offsets: where each document starts, and at last their end, `(n + 1,) int64`.
        separator: between id, title and text.
    """

    def __init__(self, directory: Path) -> None:
        self._documents = MappedFile(directory / DOCUMENTS)
        self.offsets = np.frombuffer(MappedFile(directory / OFFSETS).data, "<i8")
        self.separator = (directory / SEPARATOR).read_bytes().decode()  # not a line end

    def read(self, rows: np.ndarray) -> list[Passage]:
        """The passages at some rows."""
        data, separator = self._documents.data, self.separator
        starts, ends = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        return [
            _passage(Passage, (*data[start:end].decode().split(separator, 2), None))
            for start, end in zip(starts, ends, strict=True)
        ]

    def batches(self) -> Iterator[list[Passage]]:
        """All passages, a few thousand at a time."""
        for first in range(0, len(self.offsets) - 1, ROWS_PER_BATCH):
            rows = np.arange(first, min(first + ROWS_PER_BATCH, len(self.offsets) - 1))
            self._documents.prefetch(int(self.offsets[first]), int(self.offsets[rows[-1] + 1]))
            yield self.read(rows)


class Lookup(DocumentStore):
    """Documents and offsets, however they are read."""

    files_of = "lookup"

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write documents, offsets and separator."""
        for separator in SEPARATORS:
            if write_records(corpus, directory, separator):
                (directory / SEPARATOR).write_bytes(separator.encode())
                return
        raise DataError(
            "every control character is in some id or title of this corpus, so none can separate "
            "them in the document store 'lookup'; use the store 'corpus'"
        )


@STORES.register("lookup")
@STORES.register("lookup:mmap")
class LookupStore(Lookup):
    """Passages in a mapped file: a passage is read by one or two page faults, or from memory."""

    def open_files(self) -> Records:
        """Map the files."""
        return Records(self.directory)

    def read(self, opened: Records, rows: np.ndarray) -> list[Passage]:
        """Slices of the mapped file."""
        return opened.read(rows)


class _Reading:
    """A file that is read by system calls, and where its documents are."""

    def __init__(self, records: Records, file: BinaryIO) -> None:
        self.records, self.file = records, file

    def close(self) -> None:
        self.file.close()


@STORES.register("lookup:pread")
class ReadingLookupStore(Lookup):
    """The files of `LookupStore`, read by a system call for each passage (`pread`)."""

    def open_files(self) -> _Reading:
        """Open the documents, and map the offsets."""
        file = (self.directory / DOCUMENTS).open("rb", buffering=0)
        return _Reading(Records(self.directory), file)

    def read(self, opened: _Reading, rows: np.ndarray) -> list[Passage]:
        """A system call for each passage."""
        descriptor, separator = opened.file.fileno(), opened.records.separator
        offsets = opened.records.offsets
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        passages = []
        for start, end in zip(starts, ends, strict=True):
            record = os.pread(descriptor, end - start, start).decode()
            passages.append(_passage(Passage, (*record.split(separator, 2), None)))
        return passages


@STORES.register("memory")
class MemoryStore(Lookup):
    """All passages as objects in memory, read from the files of `LookupStore` when it is opened.

    Forked processes share the objects, and copy the pages whose reference counts they change.
    """

    open_after_fork = True

    def open_files(self) -> list[Passage]:
        """Read all passages."""
        records = Records(self.directory)
        return [passage for passages in records.batches() for passage in passages]

    def read(self, opened: list[Passage], rows: np.ndarray) -> list[Passage]:
        """Items of a list."""
        return [opened[row] for row in rows.tolist()]
