"""Document stores by name: where their files are, and how they are opened.

A name may say after a colon how the files are read: `lookup:mmap` and `lookup:pread` read the same.
"""

from __future__ import annotations

from pathlib import Path

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.stores import (  # noqa: F401 - they register stores
    arrow,
    cached,
    compressed,
    databases,
    irds,
    lookup,
    plain,
)
from mlflow_dr.stores.base import STORES, DocumentStore

__all__ = ["STORES", "DocumentStore", "open_store", "store_directory"]


def store_directory(name: str, corpus: Corpus) -> Path:
    """The directory of a document store of a corpus, made in the user's cache if it is not there.

    Raises:
        UsageError: no store has this name, or it cannot hold this corpus.
        MissingExtraError: a library of the store is not installed.
    """
    return STORES.get(name).directory_of(name, corpus)


def open_store(name: str, directory: Path) -> DocumentStore:
    """The store of a name over the files of a directory.

    Args:
        name: a name of `STORES`.
        directory: what `store_directory` returned for this name, or a copy of it.

    Raises:
        UsageError: no store has this name.
    """
    return STORES.get(name)(directory)
