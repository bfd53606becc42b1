"""Files of records: JSON lines, one JSON array, or Parquet; the first two also packed (`.gz`)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.collection.jsonarray import array_items
from mlflow_dr.errors import DataError
from mlflow_dr.files import BYTE_ORDER_MARK, opened, read_lines
from mlflow_dr.terminal import shortened

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".incomplete", ".crdownload", ".download")
SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")
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
    check_link(path)
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"


def named_files(
    folder: Path, suffixes: tuple[str, ...] = SUFFIXES, warn: bool = True
) -> list[Path]:
    """The files of records in a folder, hidden ones aside, in the order of their names.

    Links that lead nowhere are among them, so that `check_complete` refuses them. Of downloads that
    were not finished a warning tells, where `warn` is set.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    for file in files if warn else ():
        finished = file.with_suffix("")
        unfinished = file.suffix in UNFINISHED and finished.name.endswith(suffixes)
        if unfinished and finished not in files:
            log.warning("%s: passed over, as a download that was not finished", file)
    return [file for file in files if file.name.endswith(suffixes) and not file.is_dir()]


def check_complete(files: Sequence[Path]) -> None:
    """Refuse files of a folder that are not all there.

    Raises:
        DataError: one is a link that leads nowhere, or of files that count themselves
            (`x-00000-of-00003.jsonl`) one is missing.
    """
    shards: dict[tuple[Path, str, str], dict[int, str]] = defaultdict(dict)
    for file in files:
        check_link(file)
        if found := SHARD.fullmatch(file.name):
            shards[file.parent, found[1], found[3]][int(found[2][-9:])] = file.name
    for (folder, start, total), names in shards.items():
        count = int(total[-9:])
        first = 1 if count in names else 0  # some count from 1
        missing = next((one for one in range(first, first + count) if one not in names), None)
        if missing is not None:
            _, number, _, end = SHARD.fullmatch(next(iter(names.values()))).groups()  # type: ignore[union-attr]
            name = f"{start}{missing:0{len(number)}}-of-{total}{end}"
            raise DataError(
                f"{folder}: {name} is missing; there are {len(names)} of {count} such files"
            )


def check_link(path: Path) -> None:
    """Refuse a link that leads nowhere.

    Raises:
        DataError: with what it leads to.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: a link to {path.readlink()}, which does not exist; bring the file back or "
            "remove the link"
        )


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
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        # ValueError: text that is not UTF-8, times that Python cannot express
        reason = shortened(" ".join(f"{error}".split()), 200)
        raise DataError(
            f"{path}[{index}]: the Parquet file cannot be read ({reason}); if it is damaged, get "
            "it again"
        ) from error
