"""A passage as bytes: id, title and text with a separator between them.

The separator is a control character that is in no id and no title of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.progress import progress_bar

SEPARATOR = "separator"
SEPARATORS = [chr(code) for code in range(32)]
_new = tuple.__new__

Batches = Iterator[list[bytes]]


class _SeparatorIsUsedError(Exception):
    """An id or a title has the separator."""


def write_records(corpus: Corpus, directory: Path, write: Callable[[Batches], None]) -> None:
    """Write the records of a corpus and their separator.

    Args:
        corpus: the corpus.
        directory: where the separator is written.
        write: writes all records, which it gets a few thousand at a time; called again with another
            separator, if the first one is in an id or title.

    Raises:
        DataError: every control character is in some id or title.
    """
    for separator in SEPARATORS:
        try:
            write(_records(corpus, separator))
        except _SeparatorIsUsedError:
            continue
        (directory / SEPARATOR).write_bytes(separator.encode())
        return
    raise DataError(
        "every control character is in some id or title of this corpus, so none can separate them "
        "in this document store; use the store 'corpus'"
    )


def _records(corpus: Corpus, separator: str) -> Batches:
    with progress_bar(len(corpus), "making the document store", "passages") as bar:
        for passages in corpus.batches():
            heads = [f"{id}{separator}{title}{separator}" for id, title, *_ in passages]
            if sum(head.count(separator) for head in heads) != 2 * len(heads):
                raise _SeparatorIsUsedError
            yield [
                (head + passage.text).encode()
                for head, passage in zip(heads, passages, strict=True)
            ]
            bar.update(len(passages))


def read_separator(directory: Path) -> str:
    """The separator of the records in a directory."""
    return (directory / SEPARATOR).read_bytes().decode()  # may be a line end


def passage_of(record: bytes, separator: str) -> Passage:
    """The passage of a record."""
    # takes half the time of `Passage(...)`
    return _new(Passage, (*record.decode().split(separator, 2), None))


def write_end_to_end(directory: Path, name: str, batches: Batches) -> None:
    """Write records into one file, and into `NAME.offsets` where each of them starts."""
    end = 0
    offsets = directory / f"{name}.offsets"
    with (directory / name).open("wb") as records, offsets.open("wb") as starts:
        starts.write(np.zeros(1, "<i8").tobytes())
        for batch in batches:
            ends = end + np.cumsum([len(record) for record in batch])
            records.write(b"".join(batch))
            starts.write(ends.astype("<i8").tobytes())
            end = int(ends[-1])


def map_offsets(directory: Path, name: str) -> np.ndarray:
    """Where each record of a file starts, and at last their end, `(n + 1,) int64`."""
    return np.frombuffer(MappedFile(directory / f"{name}.offsets").data, "<i8")
