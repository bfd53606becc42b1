"""A store that reads nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.stores.base import NOTHING, STORES, DocumentStore

EMPTY = Passage("", "", "")


@STORES.register("null")
class NullStore(DocumentStore):
    """The same empty passage for every row: what everything around a store costs."""

    holds = NOTHING

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """There is nothing to write."""

    def open_files(self) -> Passage:
        """The passage."""
        return EMPTY

    def read(self, opened: Passage, rows: np.ndarray) -> list[Passage]:
        """The passage, for each row."""
        return [opened] * len(rows)
