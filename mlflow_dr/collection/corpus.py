"""The corpus: passages in an Arrow table that is mapped from disk, never held as Python objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once, cache_dir, digest_of
from mlflow_dr.progress import progress_bar

SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
ROWS_PER_BATCH = 8192


class Corpus:
    """Passages by row number, in the order of their source.

    Args:
        table: columns `id`, `title`, `text`, all strings without nulls; ids are unique.
        digest: digest of the contents; computed from the table when not given.
    """

    def __init__(self, table: pa.Table, digest: str | None = None) -> None:
        self._table = table
        self._batches = table.to_batches(max_chunksize=ROWS_PER_BATCH)
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches])
        self._ids: pa.ChunkedArray = table["id"]
        self._digest = digest

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def ids(self) -> pa.ChunkedArray:
        """Passage ids, `(n_passages,)` strings."""
        return self._ids

    @property
    def digest(self) -> str:
        """Digest of ids, titles and texts; equal for equal contents whatever the format."""
        if self._digest is None:
            content = _ContentDigest()
            for batch in self._batches:
                content.update(batch)
            self._digest = content.hexdigest()
        return self._digest

    def batches(self) -> Iterator[list[Passage]]:
        """All passages in order, a few thousand at a time."""
        for batch in self._batches:
            columns = (batch.column(name).to_pylist() for name in SCHEMA.names)
            yield [Passage(*values) for values in zip(*columns, strict=True)]

    def passages(self, rows: Iterable[int]) -> list[Passage]:
        """The passages at these rows, in the order asked for, repeats included."""
        return [self[int(row)] for row in rows]

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, offset = self._batches[chunk], row - int(self._starts[chunk])
        return Passage(*(batch.column(name)[offset].as_py() for name in SCHEMA.names))

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of passages, `(len(ids),) int64`; -1 where the corpus has no such id."""
        wanted = pa.array(ids, type=self._ids.type)
        found = pc.index_in(wanted, value_set=self._ids)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def tie_ranks(self) -> np.ndarray:
        """Each passage's place among equal scores, `(n_passages,) int64`: smaller comes first.

        Equal scores are ordered as trec_eval orders them, by descending passage id (`strcmp`), so
        that a ranking cut at depth k holds what trec_eval would have kept.
        """
        order = pc.sort_indices(self._ids, sort_keys=[("", "descending")]).to_numpy()
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks


class _ContentDigest:
    """SHA-256 over lengths and bytes of each column, whatever the batches it comes in."""

    def __init__(self) -> None:
        self._lengths = {name: hashlib.sha256() for name in SCHEMA.names}
        self._bytes = {name: hashlib.sha256() for name in SCHEMA.names}

    def update(self, batch: pa.RecordBatch) -> None:
        for name in SCHEMA.names:
            column = batch.column(name)
            self._lengths[name].update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
            self._bytes[name].update("".join(column.to_pylist()).encode())

    def hexdigest(self) -> str:
        parts = [h.hexdigest() for h in (*self._lengths.values(), *self._bytes.values())]
        return digest_of(*parts)


def cached_corpus(key: str, passages: Iterable[Passage], total: int | None = None) -> Corpus:
    """A corpus made from `passages` once and kept as an Arrow file in the user's cache.

    Args:
        key: names the source and its state (path, size, time of change); the cache's key.
        passages: read only when the cache has no corpus under this key.
        total: number of passages, where known, for the progress bar.

    Raises:
        DataError: there is no passage at all; or whatever reading `passages` raises.
    """
    room = build_once(
        cache_dir() / "corpora" / digest_of(key),
        lambda partial: _write(partial, passages, total),
    )
    table = pa.ipc.open_file(pa.memory_map(str(room / "corpus.arrow"))).read_all()
    return Corpus(table, digest=(room / "digest").read_text())


def _write(room: Path, passages: Iterable[Passage], total: int | None) -> None:
    room.mkdir()
    content = _ContentDigest()
    count = 0
    with (
        pa.OSFile(str(room / "corpus.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        progress_bar(total, "reading the corpus", "passages") as bar,
    ):
        for group in _grouped(passages, ROWS_PER_BATCH):
            columns = [pa.array(column, pa.string()) for column in zip(*group, strict=True)]
            batch = pa.record_batch(columns, schema=SCHEMA)
            writer.write_batch(batch)
            content.update(batch)
            count += len(group)
            bar.update(len(group))
    if count == 0:
        raise DataError("the corpus has no passages")
    (room / "digest").write_text(content.hexdigest())


def _grouped(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    iterator = iter(passages)
    while group := list(islice(iterator, size)):
        yield group
