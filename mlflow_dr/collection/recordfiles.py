"""Files of records: JSON lines, one JSON array, or Parquet; the first two also packed (`.gz`)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.collection.jsonarray import array_items
from mlflow_dr.errors import DataError
from mlflow_dr.files import read_lines

Record = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BYTES_TO_PEEK = 1024
ROWS_AT_A_TIME = 1024


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, one at a time, each with its place for messages.

    The place is `file:line` in JSON lines, and `file[index]`, from 0, in an array and in Parquet.

    Raises:
        DataError: the file is missing, truncated or damaged, or something in it is no JSON object.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif _is_array(path):
        with opened(path) as file:
            for index, item in enumerate(array_items(path, file)):
                where = f"{path}[{index}]"
                yield where, _object(item, where)
    else:
        for number, record in json_lines(path):
            yield f"{path}:{number}", record


def json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """The objects of a file of JSON lines, with their line numbers.

    Raises:
        DataError: with file:line, when the file breaks off or a line is no JSON object.
    """
    for number, line in read_lines(path):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        yield number, _object(record, f"{path}:{number}")


def state_of(path: Path) -> str:
    """Names a file and what it holds now; a cache's key.

    The key has the path, the size, and two times: of the last change of the contents (`mtime`) and
    of the file's status (`ctime`). Programs set `mtime` when they copy or unpack a file. They
    cannot set `ctime`, so a file that was replaced by another of equal size and `mtime` has a new
    key. A file that was only linked or given other rights has a new key, too, and is read again. A
    file system without a `ctime` of its own, such as an object store that is mounted, hides a
    replacement of equal size and `mtime`. The inode is left out: some mounts number files anew.

    Raises:
        DataError: there is no such file.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading, unpacked where its name ends in `.gz`.

    Raises:
        DataError: inside the block too, when the file is missing or its compression breaks off.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the compressed file is damaged or truncated ({error}); download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _is_array(path: Path) -> bool:
    with suppress(DataError), opened(path) as file:  # reading its lines says what is wrong with it
        return file.read(BYTES_TO_PEEK).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
    return False


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    index = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(f"{error}".split())
        raise DataError(
            f"{path}[{index}]: the Parquet file cannot be read ({reason}); if it is damaged, get "
            "it again"
        ) from error
