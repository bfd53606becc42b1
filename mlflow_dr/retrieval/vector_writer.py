"""Writes the vectors of a shard: first all of them by row, then files, and last the manifest.

Batches come in order of their length, files are in order of the corpus. So vectors are first
written at their places in one file, with a count of the batches that are done. A process that is
killed goes on from that count.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from torch import Tensor

from mlflow_dr.errors import CheckpointError, DataError, UsageError, quoted
from mlflow_dr.files import atomic_write, digest_of, file_sha256
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.vector_manifest import (
    NPY,
    PARQUET,
    TEVATRON,
    VectorFile,
    VectorManifest,
    damage,
    read_manifests,
)
from mlflow_dr.retrieval.vectors import DOCID, VECTOR

BYTES_PER_FILE = 1 << 30
BYTES_PER_GROUP = 1 << 24
SECONDS_BETWEEN_SAVES = 10.0
VECTORS, PROGRESS = "vectors.npy", "progress.json"
NUMBERS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}

Encode = Callable[[Sequence[np.ndarray]], Iterator[tuple[np.ndarray, Tensor]]]
"""Batches of rows -> rows and vectors of each batch, as `encode_batches` gives them."""


class _Progress(msgspec.Struct):
    """How far a shard is: what it is of, and how many batches are written."""

    key: str
    batches: int


def write_shard(
    output: Path,
    manifest: VectorManifest,
    batches: Sequence[np.ndarray],
    ids: pa.ChunkedArray,
    encode: Encode,
    *,
    replace: bool = False,
    quiet: bool = False,
) -> VectorManifest:
    """Encode a shard into files, or go on where a killed process has stopped.

    If several processes write the same shard, one does it and the others wait.

    Args:
        output: the folder.
        manifest: of the shard, without rows and files.
        batches: the rows of each batch of the shard, `(n_in_batch,) int64`.
        ids: of all texts.
        encode: makes the vectors.
        replace: whether vectors of another encoder, corpus or format are replaced.
        quiet: no progress bar.

    Returns:
        The complete manifest.

    Raises:
        UsageError: the folder has vectors of another encoder, corpus or format.
        DataError: the ids cannot be written in this format.
        CheckpointError: the encoder gives NaN.
        OSError: the disk is full, or the folder is read-only.
    """
    folder = output / f".encode{manifest.suffix}"
    finished = _finished(output, manifest, replace)
    if finished is not None:
        _clean(output, manifest, folder)
        return finished
    output.mkdir(parents=True, exist_ok=True)
    rows = np.sort(np.concatenate(batches)) if len(batches) else np.empty(0, np.int64)
    taken = ids.take(pa.array(rows))
    if manifest.file_format == NPY:
        _check_lines(taken)
    with FileLock(f"{folder}.lock"):
        finished = _finished(output, manifest, replace)
        if finished is None:
            _remove_others(output, manifest)
            folder.mkdir(exist_ok=True)
            done = _batches_done(folder, _key(manifest), replace)
            _encode_into(folder, manifest, batches, done, taken, rows, encode, quiet)
            finished = _write_files(output, manifest, folder, taken)
        _clean(output, manifest, folder)
    return finished


def _clean(output: Path, manifest: VectorManifest, folder: Path) -> None:
    """Remove the remains of killed processes, after a shard is finished.

    The lock goes, too: a process that waits for it finds that the shard is finished.
    """
    for stem in (f".{manifest.kind}{manifest.suffix}", f".{manifest.name}"):
        for remains in output.glob(f"{stem}[.-]*"):
            shutil.rmtree(remains, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        Path(f"{folder}.lock").unlink(missing_ok=True)


def _finished(output: Path, manifest: VectorManifest, replace: bool) -> VectorManifest | None:
    """The shard's manifest if the shard is complete.

    Raises:
        UsageError: the folder has vectors of something else, and they are not to be replaced.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; expected a folder to write")
    others = read_manifests(output) if output.exists() else []
    for other in others:
        difference = manifest.difference(other)
        if difference and not replace:
            raise UsageError(
                f"{output} has vectors of {difference}; choose another folder, or replace them by "
                "--force"
            )
        is_same = not difference and other.shard == manifest.shard
        if is_same and not damage(output, other, with_bytes=True):
            return other
    return None


def _remove_others(output: Path, manifest: VectorManifest) -> None:
    """Remove what is damaged, or is to be replaced."""
    for other in read_manifests(output):
        if manifest.difference(other) or other.shard == manifest.shard:
            (output / other.name).unlink()
            for file in other.files:
                (output / file.name).unlink(missing_ok=True)


def _encode_into(
    folder: Path,
    manifest: VectorManifest,
    batches: Sequence[np.ndarray],
    done: int,
    ids: pa.ChunkedArray,
    rows: np.ndarray,
    encode: Encode,
    quiet: bool,
) -> None:
    """Write the vectors of a shard into one file, `(len(rows), dimension)`.

    Args:
        folder: of the file.
        manifest: of the shard.
        batches: all of the shard.
        done: how many of them an earlier process has written.
        ids: of the shard's vectors.
        rows: of the shard's vectors, ascending, `(n,) int64`.
        encode: makes the vectors.
        quiet: no progress bar.
    """
    shape, dtype = (len(rows), manifest.dimension), NUMBERS[manifest.vector_dtype]
    key, path, done = _key(manifest), folder / VECTORS, min(done, len(batches))
    header = _npy_header(shape, dtype)
    size = len(header) + len(rows) * manifest.dimension * dtype.itemsize
    if not path.is_file() or path.stat().st_size != size:
        done = 0
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _allocate(file, size)
        os.pwrite(file, header, 0)
        writer = _RowWriter(file, len(header), rows, ids, manifest)
        total = sum(map(len, batches))
        saved = time.monotonic()
        with progress_bar(total, f"encoding the {manifest.kind}", manifest.kind, quiet) as bar:
            bar.update(sum(map(len, batches[:done])))
            for batch_rows, vectors in encode(batches[done:]):
                writer.write(batch_rows, vectors)
                bar.update(len(batch_rows))
                done += 1
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    _save(file, folder, _Progress(key, done))
                    saved = time.monotonic()
    finally:
        with suppress(OSError):  # a full disk is reported as such
            _save(file, folder, _Progress(key, done))
        os.close(file)


def _allocate(file: int, size: int) -> None:
    """Give a file its size; a disk that is too small is known at once."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
                raise


class _RowWriter:
    """Writes vectors at the places of their rows.

    `os.pwrite` instead of a map: a full disk is an error and not a signal.
    """

    def __init__(
        self,
        file: int,
        start: int,
        rows: np.ndarray,
        ids: pa.ChunkedArray,
        manifest: VectorManifest,
    ) -> None:
        self._file = file
        self._start = start
        self._rows = rows
        self._ids = ids
        self._dtype = NUMBERS[manifest.vector_dtype]
        self._width = manifest.dimension * self._dtype.itemsize

    def write(self, rows: np.ndarray, vectors: Tensor) -> None:
        numbers = vectors.cpu().numpy().astype(self._dtype)
        places = np.searchsorted(self._rows, rows)
        finite = np.isfinite(numbers).all(axis=1)
        if not finite.all():
            name = self._ids[int(places[np.argmin(finite)])].as_py()
            raise CheckpointError(
                f"the encoder gives NaN or infinity for {quoted(name)} and {(~finite).sum() - 1} "
                "more of this batch; the weights are broken, or overflow in this number format "
                "(try --dtype fp32)"
            )
        for place, vector in zip(places.tolist(), numbers, strict=True):
            os.pwrite(self._file, vector.data, self._start + place * self._width)


def _batches_done(folder: Path, key: str, replace: bool) -> int:
    """How many batches an earlier process has written."""
    path = folder / PROGRESS
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=_Progress)
    except (OSError, msgspec.DecodeError):
        return 0
    if progress.key == key:
        return progress.batches
    if not replace:
        raise UsageError(
            f"{folder.parent} has unfinished vectors of another encoder, corpus or format; choose "
            "another folder, or replace them by --force"
        )
    return 0


def _save(file: int, folder: Path, progress: _Progress) -> None:
    os.fsync(file)
    with atomic_write(folder / PROGRESS) as partial:
        partial.write_bytes(msgspec.json.encode(progress))


def _key(manifest: VectorManifest) -> str:
    """Of what the vectors depend on; names of encoder and collection may change."""
    names = ("encoder", "dataset")
    return digest_of(*(value for name, value in _plain(manifest).items() if name not in names))


def _plain(manifest: VectorManifest) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return plain


def _npy_header(shape: tuple[int, int], dtype: np.dtype[Any]) -> bytes:
    """The header of a NumPy file, as `numpy.save` writes it."""
    header = BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _write_files(
    output: Path, manifest: VectorManifest, folder: Path, ids: pa.ChunkedArray
) -> VectorManifest:
    """The files of a shard, and then its manifest.

    Args:
        output: where they are written.
        manifest: without rows and files.
        folder: has the vectors in one file.
        ids: of the vectors.
    """
    write = {PARQUET: _parquet_files, NPY: _npy_files, TEVATRON: _pickle_files}
    stem = output / f"{manifest.kind}{manifest.suffix}"
    files = write[manifest.file_format](stem, folder / VECTORS, ids)
    finished = msgspec.structs.replace(manifest, rows=len(ids), files=tuple(files))
    with atomic_write(output / manifest.name) as partial:
        partial.write_text(json.dumps(_plain(finished), indent=1) + "\n", encoding="utf-8")
    return finished


def _parquet_files(stem: Path, source: Path, ids: pa.ChunkedArray) -> list[VectorFile]:
    vectors: np.memmap[Any, Any] = np.load(source, mmap_mode="r")
    per_file = max(1, BYTES_PER_FILE // _width(vectors))
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    schema = pa.schema([pa.field(DOCID, pa.string()), pa.field(VECTOR, kind)])
    files = []
    # a shard without rows has a file, too: `datasets` takes what most files of a folder are
    for number, first in enumerate(range(0, max(1, len(ids)), per_file)):
        path = stem.with_name(f"{stem.name}-{number:05}.parquet")
        last = min(first + per_file, len(ids))
        with (
            atomic_write(path) as partial,
            # numbers of vectors hardly repeat: dictionaries and compression would only take time
            pq.ParquetWriter(
                partial, schema, compression="none", use_dictionary=False, write_statistics=False
            ) as writer,
        ):
            for chunk, start in _read_by_rows(source, vectors, first, last):
                column = pa.FixedSizeListArray.from_arrays(chunk.reshape(-1), type=kind)
                docids = ids[start : start + len(chunk)].combine_chunks()
                writer.write_batch(pa.record_batch([docids, column], schema))
        files.append(_listed(path, last - first))
    return files


def _read_by_rows(
    source: Path, vectors: np.memmap[Any, Any], first: int, last: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Vectors a group at a time; read and not mapped, so that memory does not fill with them."""
    size = max(1, BYTES_PER_GROUP // _width(vectors))
    with source.open("rb") as file:
        file.seek(vectors.offset + first * _width(vectors))
        for start in range(first, last, size):
            count = min(size, last - start)
            numbers = np.fromfile(file, vectors.dtype, count * vectors.shape[1])
            yield numbers.reshape(count, -1), start


def _width(vectors: np.ndarray) -> int:
    """Bytes of a vector."""
    return vectors.shape[1] * vectors.dtype.itemsize


def _npy_files(stem: Path, source: Path, ids: pa.ChunkedArray) -> list[VectorFile]:
    names = stem.with_name(f"{stem.name}.ids")
    with atomic_write(names) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for chunk in ids.chunks:
            file.writelines(f"{name}\n" for name in chunk.to_pylist())
    path = stem.with_name(f"{stem.name}.npy")
    source.replace(path)
    return [_listed(path, len(ids)), _listed(names, len(ids))]


def _pickle_files(stem: Path, source: Path, ids: pa.ChunkedArray) -> list[VectorFile]:
    path = stem.with_name(f"{stem.name}.pkl")
    with atomic_write(path) as partial, partial.open("wb") as file:
        pickle.dump((np.load(source), ids.to_pylist()), file, protocol=4)
    return [_listed(path, len(ids))]


def _listed(path: Path, rows: int) -> VectorFile:
    return VectorFile(path.name, rows, path.stat().st_size, file_sha256(path))


def _check_lines(ids: pa.ChunkedArray) -> None:
    """Refuse ids that a file of one id on each line cannot hold."""
    refused = ids.filter(pc.match_substring(ids, "\n"))
    if len(refused):
        raise DataError(
            f"id {quoted(refused[0].as_py())} has a line break, which a file of ids cannot hold; "
            "use --format parquet"
        )
