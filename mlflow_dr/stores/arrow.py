"""A dataset of Hugging Face's `datasets`, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.stores.base import STORES, DocumentStore

FILE = "data.arrow"
ROWS_PER_BATCH = 1000
"""Of a record batch, as `datasets` writes them."""


@STORES.register("arrow")
class ArrowStore(DocumentStore):
    """A file of `datasets.Dataset`, read in the format `arrow`, all rows of a request at once."""

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write an Arrow stream."""
        with (
            pa.OSFile(str(directory / FILE), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as stream,
        ):
            for passages in corpus.batches():
                columns = list(zip(*passages, strict=True))[: len(SCHEMA)]
                arrays = [pa.array(column, pa.string()) for column in columns]
                stream.write_table(pa.table(arrays, schema=SCHEMA), max_chunksize=ROWS_PER_BATCH)

    def open_files(self) -> Any:
        """Map the file."""
        from datasets import Dataset

        return Dataset.from_file(str(self.directory / FILE)).with_format("arrow")

    def read(self, opened: Any, rows: np.ndarray) -> list[Passage]:
        """All passages by one request."""
        table = opened[rows.tolist()]
        return [*map(Passage, *(table[name].to_pylist() for name in SCHEMA.names))]
