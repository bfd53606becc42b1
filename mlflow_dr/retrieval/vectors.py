"""Vectors on disk: Parquet or NumPy files, and a manifest for each shard, which is written last.

A Parquet file has the columns `docid` (string) and `vector` (fixed-size list of fp32 or fp16). A
NumPy file `NAME.npy` has the vectors, and `NAME.ids` the ids, one on each line. Parquet files of
other programs are read, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlflow_dr.errors import DataError, MlflowDrError, UsageError, one_line, quoted
from mlflow_dr.files import digest_of
from mlflow_dr.retrieval.vector_manifest import (
    TEVATRON,
    VectorManifest,
    damage,
    has_ids,
    missing_shards,
    read_manifests,
)

DOCID, VECTOR = "docid", "vector"
ID_COLUMNS = (DOCID, "id", "_id", "doc_id", "passage_id", "text_id", "query_id", "qid", "pid")
VECTOR_COLUMNS = (VECTOR, "vectors", "embedding", "embeddings", "emb", "dense_vector")
ROWS_READ = 8192
BYTES_READ = 1 << 20


class _Part(msgspec.Struct, frozen=True):
    """A file of vectors and its columns."""

    path: Path
    rows: int
    id_column: str = DOCID
    vector_column: str = VECTOR

    def ids(self) -> pa.ChunkedArray:
        """Ids, `(rows,)` strings."""
        if self.path.suffix == ".npy":
            text = self.path.with_suffix(".ids").read_bytes().decode()  # no other line ends
            return pa.chunked_array([pa.array(text.split("\n")[:-1], pa.string())])
        column = pq.read_table(self.path, columns=[self.id_column])[self.id_column]
        return column.cast(pa.string())

    def chunks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Vectors of some of its rows, a few thousand at a time, `(n, dimension) float32`."""
        if self.path.suffix == ".npy":
            yield from self._npy_chunks(start, stop)
            return
        # one group of rows at a time, by a small buffer: otherwise Arrow reads a file as a whole
        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=BYTES_READ) as file:
            first = 0
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if first < stop and last > start:
                    columns = [self.vector_column]
                    for batch in file.iter_batches(ROWS_READ, row_groups=[group], columns=columns):
                        part = batch.column(0)[max(0, start - first) : max(0, stop - first)]
                        first += batch.num_rows
                        if len(part):
                            yield self._numbers(part)
                first = last

    def _npy_chunks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Read and not mapped, so that memory does not fill with the pages of the file."""
        mapped: np.memmap[Any, Any] = np.load(self.path, mmap_mode="r")
        width, dtype, offset = mapped.shape[1], mapped.dtype, mapped.offset
        if mapped.shape[0] < stop:
            raise ValueError(f"it has {mapped.shape[0]} rows")
        with self.path.open("rb") as file:
            file.seek(offset + start * width * dtype.itemsize)
            for first in range(start, stop, ROWS_READ):
                count = min(ROWS_READ, stop - first)
                numbers = np.fromfile(file, dtype, count * width)
                yield np.asarray(numbers.reshape(count, width), np.float32)

    def _numbers(self, column: pa.Array) -> np.ndarray:
        lengths = pc.unique(pc.list_value_length(column))
        if column.null_count or len(lengths) != 1 or lengths[0].as_py() in (None, 0):
            raise DataError(
                f"{self.path}: column {self.vector_column} has missing vectors, or vectors of "
                "different lengths"
            )
        numbers = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(numbers.reshape(len(column), -1), np.float32)


class Vectors:
    """Vectors of a folder, by row; the rows of its files follow each other.

    Args:
        parts: the files.
        ids: of all rows.
        dimension: of a vector.
        manifests: of the shards; none for files of other programs.
    """

    def __init__(
        self,
        parts: list[_Part],
        ids: pa.ChunkedArray,
        dimension: int,
        manifests: list[VectorManifest],
    ) -> None:
        self._parts = parts
        self.ids = ids
        self.dimension = dimension
        self.manifest = manifests[0] if manifests else None
        self.n_missing_shards = len(missing_shards(manifests)) if manifests else 0
        files = [file.sha256 for manifest in manifests for file in manifest.files]
        sizes = [f"{part.path.name} {part.path.stat().st_size}" for part in parts]
        self.digest = digest_of(*(files or sizes))

    def __len__(self) -> int:
        return len(self.ids)

    def check_queries(
        self, name: object, of: object, shape: tuple[int, ...], encoder_digest: str | None
    ) -> None:
        """Refuse vectors of queries that cannot be compared with these passages.

        Args:
            name: of the queries, for the message.
            of: the folder of these passages, for the message.
            shape: of the queries, `(n, dimension)`.
            encoder_digest: of the encoder of the queries; None if it is not known.

        Raises:
            UsageError: there are none, or they are of another encoder.
        """
        about = self.manifest
        if about and encoder_digest not in (None, about.encoder_digest):
            raise UsageError(
                f"{name}: encoded by another encoder than {of} ({about.encoder}); encode both by "
                "one checkpoint"
            )
        if not shape[0]:
            raise UsageError(f"{name}: there are no queries")
        if shape[1] != self.dimension:
            raise UsageError(
                f"{name}: {shape[1]} dimensions, but {of} has {self.dimension}; they are of "
                "different encoders"
            )

    def chunks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Some of the vectors, streamed from the files.

        Args:
            start: the first row.
            stop: the row after the last.
            size: the most rows of a chunk.

        Yields:
            The first row of a chunk, and its vectors `(n, dimension) float32`.

        Raises:
            DataError: a file is damaged, or a vector has NaN or infinity.
        """
        chunk, row, filled = np.empty((0, self.dimension), np.float32), start, 0
        for vectors in self._pieces(start, stop):
            while len(vectors):
                if not len(chunk):
                    chunk = np.empty((min(size, stop - row), self.dimension), np.float32)
                taken = vectors[: len(chunk) - filled]
                chunk[filled : filled + len(taken)] = taken
                vectors, filled = vectors[len(taken) :], filled + len(taken)
                if filled == len(chunk):
                    yield row, chunk
                    row, filled, chunk = row + filled, 0, chunk[:0]

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Vectors as the files give them, checked."""
        before = 0
        for part in self._parts:
            first = max(start - before, 0)
            row = before + first
            for vectors in _readable(part, first, min(stop - before, part.rows)):
                if vectors.shape[1] != self.dimension:
                    raise DataError(
                        f"{part.path}: vectors of {vectors.shape[1]} dimensions; the other files "
                        f"have {self.dimension}"
                    )
                finite = np.isfinite(vectors).all(axis=1)
                if not finite.all():
                    name = self.ids[row + int(np.argmin(finite))].as_py()
                    raise DataError(f"{part.path}: the vector of {quoted(name)} is not finite")
                yield vectors
                row += len(vectors)
            before += part.rows

    def read(self) -> np.ndarray:
        """All of them, `(n, dimension) float32`; for queries.

        Raises:
            DataError: see `chunks`.
        """
        for _, vectors in self.chunks(0, len(self), len(self)):
            return vectors
        return np.empty((0, self.dimension), np.float32)


def _readable(part: _Part, start: int, stop: int) -> Iterator[np.ndarray]:
    if start >= stop:
        return
    with _errors_of_files(part.path):
        rows = 0
        for vectors in part.chunks(start, stop):
            rows += len(vectors)
            yield vectors
        if rows < stop - start:
            raise DataError(f"{part.path}: has {rows:,} vectors where {stop - start:,} should be")


@contextmanager
def _errors_of_files(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for damaged files, errors of any kind, into one line.

    Raises:
        DataError: with the path.
    """
    try:
        yield
    except MlflowDrError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def open_vectors(*paths: Path, partial: bool = False) -> Vectors:
    """The vectors of folders that `mlflow-dr encode` has written, or of other Parquet files.

    Sizes and numbers of rows are checked; `encode --check` compares the bytes, too.

    Args:
        paths: a folder or a Parquet file; several if shards are in folders of their own.
        partial: whether shards may be missing.

    Raises:
        UsageError: no vectors are there, or shards are missing.
        DataError: a file is damaged, shards do not belong together, or an id is missing or used
            twice.
    """
    shown = ", ".join(map(str, paths))
    found = [(manifest, path) for path in paths for manifest in read_manifests(path)]
    found.sort(key=lambda pair: (pair[0].shards, pair[0].shard))
    manifests = [manifest for manifest, _ in found]
    if found:
        if without := set(paths) - {path for _, path in found}:
            raise UsageError(f"{min(without)}: no manifest of vectors")
        _check_shards(shown, found, partial)
        parts = [
            _Part(path / file.name, file.rows)
            for manifest, path in found
            for file in manifest.files
            if not has_ids(file)
        ]
        dimension = manifests[0].dimension
    else:
        others = [_other_parts(path) for path in paths]
        parts = [part for some, _ in others for part in some]
        dimension = next((dimension for _, dimension in others if dimension), 0)
    chunks: list[pa.Array] = []
    for part in parts:
        with _errors_of_files(part.path):
            chunks += part.ids().chunks
    ids = pa.chunked_array(chunks, pa.string())
    if len(ids) != sum(part.rows for part in parts):
        raise DataError(f"{shown}: there are not as many ids as vectors; encode again")
    _check_ids(shown, ids)
    return Vectors(parts, ids, dimension, manifests)


def _check_shards(shown: str, found: Sequence[tuple[VectorManifest, Path]], partial: bool) -> None:
    first, shards = found[0][0], set[int]()
    for manifest, path in found:
        if difference := first.difference(manifest):
            raise DataError(f"{path}: {manifest.name} is of {difference} (as {first.name})")
        if problem := damage(path, manifest, with_bytes=False):
            raise DataError(f"{path}: {problem}; encode this shard again")
        if manifest.shard in shards:
            raise UsageError(f"{path}: another folder has {manifest.name}, too")
        shards.add(manifest.shard)
    if first.file_format == TEVATRON:
        raise UsageError(f"{shown}: pickles are written for Tevatron and never read; {REENCODE}")
    if partial:
        return
    manifests = [manifest for manifest, _ in found]
    if missing := missing_shards(manifests):
        numbers = ", ".join(map(str, missing[:10]))
        raise UsageError(
            f"{shown}: of {first.shards} shards {len(missing)} are missing ({numbers}); encode "
            f"them with --shard {missing[0]}/{first.shards}, or search with --partial"
        )
    if (rows := sum(manifest.rows for manifest in manifests)) != first.texts:
        raise DataError(f"{shown}: the shards have {rows:,} vectors of {first.texts:,} texts")


REENCODE = "encode with --format parquet or npy"


def _other_parts(path: Path) -> tuple[list[_Part], int]:
    """Parquet files of other programs, in the order of their names, and the dimension."""
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    files = [file for file in files if file.suffix == ".parquet"]
    if not files:
        pickles = path.suffix == ".pkl" or any(path.glob("*.pkl"))
        why = f"pickles are never read, because they can run code; {REENCODE}" if pickles else ""
        raise UsageError(f"{path}: no vectors here; " + (why or "expected *.parquet or a manifest"))
    parts, dimension = [], 0
    for file in files:
        with _errors_of_files(file), pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
        part = _Part(file, rows, _id_column(file, schema), _vector_column(file, schema))
        if rows and not dimension:
            dimension = next(_readable(part, 0, 1)).shape[1]
        parts.append(part)
    return parts, dimension


def _id_column(file: Path, schema: pa.Schema) -> str:
    names = [field.name for field in schema if _is_id(field.type)]
    return _chosen(file, [name for name in ID_COLUMNS if name in names] or names, "id", ID_COLUMNS)


def _vector_column(file: Path, schema: pa.Schema) -> str:
    names = [field.name for field in schema if _is_vector(field.type)]
    preferred = [name for name in VECTOR_COLUMNS if name in names]
    return _chosen(file, preferred or names, "vector", VECTOR_COLUMNS)


def _chosen(file: Path, names: list[str], what: str, known: tuple[str, ...]) -> str:
    if not names or (len(names) > 1 and names[0] not in known):
        having = f"several ({', '.join(names)})" if names else "none"
        raise DataError(f"{file}: expected one {what} column, called {known[0]}; it has {having}")
    return names[0]


def _is_id(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    )


def _is_vector(kind: pa.DataType) -> bool:
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return is_list and bool(pa.types.is_floating(kind.value_type))


def _check_ids(path: str, ids: pa.ChunkedArray) -> None:
    if ids.null_count or len(ids.filter(pc.equal(ids, ""))):
        raise DataError(f"{path}: a vector has no id")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise DataError(
            f"{path}: id {quoted(twice[0].as_py())} is used twice ({len(twice):,} are); a ranking "
            "by ids would be wrong"
        )
