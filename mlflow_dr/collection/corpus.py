"""The corpus: passages in an Arrow table that is mapped from disk and not held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.columns import Strings, extent, strings
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import digest_of
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.progress import progress_bar

SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
TOKENS = pa.field("tokens", pa.list_(pa.int32()))
TOKENISED_SCHEMA = SCHEMA.append(TOKENS)
ROWS_PER_BATCH = 2048  # their Python objects fit the cache of a processor
MANY = 0.05
"""Share of a corpus from which on reading all of it is quicker than reading single pages."""
_new = tuple.__new__
"""`_new(Passage, values)` takes half the time of `Passage(*values)`."""


class Corpus:
    """Passages by row number, in the order of their source.

    Args:
        table: columns `id`, `title`, `text`, all strings without nulls; ids are unique. A corpus
            that is tokenised already has a fourth, `tokens`: lists of ids without special tokens.
        digest: digest of the contents; computed from the table when not given.
        directory: the directory that `table` is mapped from, so that a process that is sent the
            corpus maps it, too, instead of receiving its passages.
        mapped: the file of `table`.

    Attributes:
        directory: the directory that the corpus is mapped from; None if it is in memory.
    """

    def __init__(
        self,
        table: pa.Table,
        digest: str | None = None,
        directory: Path | None = None,
        mapped: MappedFile | None = None,
    ) -> None:
        self.directory = directory
        self._mapped = mapped
        self._schema = TOKENISED_SCHEMA if TOKENS.name in table.column_names else SCHEMA
        self._table = table.select(self._schema.names)
        self._batches = self._table.to_batches(max_chunksize=ROWS_PER_BATCH)
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches])
        self._strings: list[tuple[Strings, Strings, Strings] | None] = [None] * len(self._batches)
        self._ids: pa.ChunkedArray = table["id"]
        self._ids_are_read = False
        self._digest = digest

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Callable[..., Corpus], tuple[Any, ...]]:
        if self.directory is not None:
            return open_corpus, (self.directory,)
        return Corpus, (self._table, self._digest)

    @property
    def tokenised(self) -> bool:
        """Whether the passages are token ids instead of text."""
        return self._schema is TOKENISED_SCHEMA

    @property
    def ids(self) -> pa.ChunkedArray:
        """Passage ids, `(n_passages,)` strings."""
        if not self._ids_are_read:
            for chunk in self._ids.chunks:
                self._prefetch([chunk])
            self._ids_are_read = True
        return self._ids

    @property
    def digest(self) -> str:
        """Digest of ids, titles, texts and tokens; equal for equal contents whatever the format."""
        if self._digest is None:
            content = ContentDigest(self._schema)
            for batch in self._batches:
                content.update(batch)
            self._digest = content.hexdigest()
        return self._digest

    def batches(self, rows: np.ndarray | None = None) -> Iterator[list[Passage]]:
        """Passages a few thousand at a time: all in order, or those at some rows, `(n,) int64`."""
        if rows is not None:
            for start in range(0, len(rows), ROWS_PER_BATCH):
                some = rows[start : start + ROWS_PER_BATCH]
                if len(rows) > MANY * len(self):
                    for chunk in np.unique(self._places(some)[0]).tolist():
                        self._prefetch(self._batches[chunk].columns)
                yield self.passages(some)
            return
        for batch, following in zip(self._batches, [*self._batches[1:], None], strict=True):
            if following is not None:
                self._prefetch(following.columns)
            columns = (batch.column(name).to_pylist() for name in self._schema.names)
            yield [Passage(*values) for values in zip(*columns, strict=True)]

    def passages(self, rows: Iterable[int]) -> list[Passage]:
        """The passages at these rows, in this order, with repeats.

        Raises:
            IndexError: there is no such row.
        """
        wanted = rows if isinstance(rows, np.ndarray) else np.fromiter(rows, np.int64)
        chunks, places = self._places(wanted)
        if self.tokenised:
            return [self._tokenised(*place) for place in zip(chunks, places, strict=True)]
        passages = []
        for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True):
            ids, titles, texts = self._strings[chunk] or self._read(chunk)
            values = (
                str(ids.data[ids.offsets[place] : ids.offsets[place + 1]], "utf-8"),
                str(titles.data[titles.offsets[place] : titles.offsets[place + 1]], "utf-8"),
                str(texts.data[texts.offsets[place] : texts.offsets[place + 1]], "utf-8"),
                None,
            )
            passages.append(_new(Passage, values))
        return passages

    def __getitem__(self, row: int) -> Passage:
        return self.passages([row])[0]

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The batch of each row, and its row there."""
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"row {rows[outside][0]} of a corpus of {len(self)} passages")
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        return chunks, rows - self._starts[chunks]

    def _read(self, chunk: int) -> tuple[Strings, Strings, Strings]:
        """Views of the columns of a batch."""
        ids, titles, texts = (strings(column) for column in self._batches[chunk].columns[:3])
        self._strings[chunk] = ids, titles, texts
        return ids, titles, texts

    def _tokenised(self, chunk: int, place: int) -> Passage:
        columns = self._batches[chunk].columns
        return Passage(*(column[int(place)].as_py() for column in columns))

    def _prefetch(self, arrays: list[pa.Array]) -> None:
        """Have parts of the file read that are about to be read in order."""
        if self._mapped is not None:
            start, stop = extent(arrays)
            base = pa.py_buffer(self._mapped.data).address
            self._mapped.prefetch(start - base, stop - base)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of passages, `(len(ids),) int64`; -1 where the corpus has no such id."""
        wanted = pa.array(ids, type=self._ids.type)
        rows = pc.index_in(wanted, value_set=self.ids)
        return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def tie_ranks(self) -> np.ndarray:
        """Each passage's rank among equal scores, `(n_passages,) int64`; see `tie_ranks`."""
        return tie_ranks(self.ids)


def tie_ranks(ids: pa.ChunkedArray) -> np.ndarray:
    """The rank of each passage among equal scores, `(n_passages,) int64`, smaller first.

    Equal scores are ordered as trec_eval orders them, by descending passage id (`strcmp`), so that
    a ranking that is cut at depth k has the passages that trec_eval would keep.
    """
    order = pc.sort_indices(ids, sort_keys=[("", "descending")]).to_numpy()
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def check_ids(ids: pa.Array | pa.ChunkedArray) -> None:
    """Refuse passage ids with a NUL character, where trec_eval's strings end.

    Raises:
        DataError: with the first of them.
    """
    refused = ids.filter(pc.match_substring(ids, "\0"))
    if len(refused):
        raise DataError(
            f"passage id {quoted(refused[0].as_py())} has a NUL character; remove it, because "
            "trec_eval cannot name such an id"
        )


def open_corpus(directory: Path) -> Corpus:
    """The corpus that a `CorpusWriter` wrote into this folder, mapped from it."""
    mapped = MappedFile(directory / "corpus.arrow")
    table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped.data))).read_all()
    return Corpus(table, (directory / "digest").read_text(), directory, mapped)


def cached_corpus(
    key: str, passages: Iterable[Passage], total: int | None = None, location: str = "the source"
) -> Corpus:
    """A corpus made from `passages` once and kept as an Arrow file in the user's cache.

    Args:
        key: names the source and its state (see `state_of`); the cache's key.
        passages: read only when the cache has no corpus under this key.
        total: number of passages, where known, for the progress bar.
        location: the source, for messages.

    Raises:
        DataError: there are no passages; and anything that reading `passages` raises.
    """

    def write(partial: Path) -> None:
        with CorpusWriter(partial, total) as writer:
            for passage in passages:
                writer.add(passage)
        if len(writer) == 0:
            raise DataError(f"{location}: the corpus has no passages")

    return open_corpus(cache_entry("corpora", key, write, location))


class CorpusWriter:
    """Writes passages into a directory, a batch at a time; `open_corpus` maps them.

    The first passage decides whether the corpus has text or tokens.

    Args:
        directory: the folder, which is made if it does not exist yet.
        total: number of passages, where known, for the progress bar.
        quiet: whether there is no progress bar.
    """

    def __init__(self, directory: Path, total: int | None = None, quiet: bool = False) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._buffer: list[Passage] = []
        self._written = 0
        self._schema: pa.Schema | None = None
        self._sink = pa.OSFile(str(directory / "corpus.arrow"), "wb")
        self._bar = progress_bar(total, "reading the corpus", "passages", quiet)

    def __len__(self) -> int:
        return self._written + len(self._buffer)

    def add(self, passage: Passage) -> None:
        """Write one passage; its row is the number of passages before it."""
        self._buffer.append(passage)
        if len(self._buffer) == ROWS_PER_BATCH:
            self._flush()

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._sink, self._bar:
            if error is not None:
                return
            self._flush()
            self._file.close()
            (self._directory / "digest").write_text(self._content.hexdigest())

    def _flush(self) -> None:
        if self._schema is None:
            tokenised = bool(self._buffer) and self._buffer[0].tokens is not None
            self._schema = TOKENISED_SCHEMA if tokenised else SCHEMA
            self._file = pa.ipc.new_file(self._sink, self._schema)
            self._content = ContentDigest(self._schema)
        columns = zip(*self._buffer, strict=True) if self._buffer else ((),) * 4
        # a corpus of text has no fourth column
        fields = zip(columns, self._schema, strict=False)
        arrays = [pa.array(column, field.type) for column, field in fields]
        check_ids(arrays[0])
        batch = pa.record_batch(arrays, schema=self._schema)
        self._file.write_batch(batch)
        self._content.update(batch)
        self._bar.update(len(batch))
        self._written += len(batch)
        self._buffer.clear()


ITEMS = "[]"


class ContentDigest:
    """SHA-256 over the lengths and the bytes of each column, independent of how rows are batched.

    Args:
        schema: columns of strings, numbers, or lists of either, without nulls.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._columns = schema.names
        names = [name for field in schema for name in _streams(field.name, field.type)]
        self._lengths = {name: hashlib.sha256() for name in names}
        self._bytes = {name: hashlib.sha256() for name in names}

    def update(self, batch: pa.RecordBatch) -> None:
        """Add the next rows."""
        for name in self._columns:
            self._update(name, batch.column(name))

    def hexdigest(self) -> str:
        """The digest so far, 16 hexadecimal characters."""
        parts = [h.hexdigest() for h in (*self._lengths.values(), *self._bytes.values())]
        return digest_of(*parts)

    def _update(self, name: str, column: pa.Array) -> None:
        if pa.types.is_list(column.type):
            self._lengths[name].update(_plain(pc.list_value_length(column), "<i8"))
            self._update(name + ITEMS, column.flatten())
        elif pa.types.is_string(column.type):
            self._lengths[name].update(_plain(pc.binary_length(column), "<i8"))
            values = strings(column)
            self._bytes[name].update(values.data[values.offsets[0] : values.offsets[-1]])
        else:
            wide = "<f8" if pa.types.is_floating(column.type) else "<i8"
            self._bytes[name].update(_plain(column, wide))


def _streams(name: str, kind: pa.DataType) -> list[str]:
    """The name of a column, and of the items of its lists."""
    inner = _streams(name + ITEMS, kind.value_type) if pa.types.is_list(kind) else []
    return [name, *inner]


def _plain(numbers: pa.Array, dtype: str) -> bytes:
    return numbers.to_numpy(zero_copy_only=False).astype(dtype).tobytes()
