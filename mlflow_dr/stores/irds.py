"""The document store of ir_datasets, over a corpus of ours."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.irds import library, reading
from mlflow_dr.collection.records import Passage
from mlflow_dr.progress import progress_bar
from mlflow_dr.stores.base import IDS, STORES, DocumentStore
from mlflow_dr.stores.ids import MappedIds

FOLDER = "docs.pklz4"
KEY = "doc_id"


class Document(NamedTuple):
    """A passage as ir_datasets stores it."""

    doc_id: str
    title: str
    text: str


def _docs(directory: Path, access: str) -> Any:
    """ir_datasets' store of a folder."""
    library()
    from ir_datasets.indices import DocstoreOptions, FileAccess, PickleLz4FullStore

    options = DocstoreOptions(FileAccess[access])
    return PickleLz4FullStore(str(directory / FOLDER), None, Document, KEY, [KEY], options=options)


class _Opened:
    """The store, one thread at a time, because its file has one position."""

    def __init__(self, directory: Path, access: str) -> None:
        self._ids = MappedIds(directory / IDS)
        self._lock = threading.Lock()
        with reading(f"{directory}"):
            self._docs = _docs(directory, access)
            next(iter(self._docs))  # opens the files; later, they would be announced on the screen

    def read(self, rows: np.ndarray) -> list[Passage]:
        ids = self._ids.get_many(rows)
        with self._lock:
            # in the order of the file, without repeats
            found = self._docs.get_many(ids)
        return [Passage(*found[id]) for id in ids]

    def close(self) -> None:
        self._docs.lookup.close()


@STORES.register("ir_datasets")
@STORES.register("ir_datasets:mmap")
class IrDatasetsStore(DocumentStore):
    """Passages pickled and compressed by LZ4 one by one, found by id: `get_many` of ir_datasets."""

    files_of = "ir_datasets"
    access: ClassVar[str] = "MMAP"

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the store as ir_datasets does."""
        with (
            reading(f"{directory}"),
            _docs(directory, cls.access).lookup.transaction() as transaction,
            progress_bar(len(corpus), "making the document store", "passages") as bar,
        ):
            for passages in corpus.batches():
                for passage in passages:
                    transaction.add(Document(*passage[:3]))
                bar.update(len(passages))

    def open_files(self) -> _Opened:
        """Open the files."""
        return _Opened(self.directory, self.access)

    def read(self, opened: _Opened, rows: np.ndarray) -> list[Passage]:
        """The passages of the ids of the rows."""
        return opened.read(rows)


@STORES.register("ir_datasets:file")
class IrDatasetsFileStore(IrDatasetsStore):
    """The same files, read by seeking; ir_datasets' default."""

    access = "FILE"


@STORES.register("ir_datasets:memory")
class IrDatasetsMemoryStore(IrDatasetsStore):
    """The same files, read into memory when they are opened."""

    access = "MEMORY"
