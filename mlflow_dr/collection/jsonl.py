"""Files of records: JSON lines, one JSON array, or Parquet; the first two also packed (`.gz`)."""

from __future__ import annotations

import codecs
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.errors import LONGEST_QUOTE, DataError, quoted
from mlflow_dr.files import BYTE_ORDER_MARK, LONGEST_LINE, opened, read_lines
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


LARGEST_ID = 10**100
LARGEST_NUMBER = 3.4e38


def identifier(record: Record, field: str, where: str) -> str:
    """An id: a string that `check_id` allows, or a whole number, as a string.

    Raises:
        DataError: it is missing or something else.
    """
    value = record.get(field)
    if isinstance(value, str) and value:
        return check_id(value, where)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_ID:
        return str(value)
    raise DataError(f"{where}: no {field!r}, or not a string; got {quoted(value)}")


def check_id(value: str, where: str) -> str:
    """An id that judgements can name and trec_eval can read; given back as it is.

    Raises:
        DataError: it is empty, has white space at its start or end, or a NUL character, where
            trec_eval's strings end.
    """
    if not value:
        raise DataError(f"{where}: an id is empty; expected a string such as 'p1'")
    if "\0" in value or value != value.strip():
        fault = "a NUL character" if "\0" in value else "white space at its start or end"
        raise DataError(
            f"{where}: id {quoted(value)} has {fault}; remove it, because files of judgements and "
            "trec_eval cannot name such an id"
        )
    return value


def fields_of(record: Record) -> str:
    """The names of a record's fields, for messages."""
    return shortened(", ".join(record), LONGEST_QUOTE) or "(none)"


def optional_identifier(record: Record, fields: Sequence[str], where: str) -> str:
    """The id under the first of these fields that the record has; empty where it has none."""
    for field in fields:
        if record.get(field) not in (None, ""):
            return identifier(record, field, where)
    return ""


def text(record: Record, field: str, where: str) -> str:
    """A string, which may be empty.

    Raises:
        DataError: it is missing or no string.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where}: no {field!r}, or not a string; got {quoted(value)}")
    return value


def optional_text(record: Record, field: str, where: str) -> str:
    """A string; empty where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is not a string; got {quoted(value)}")
    return value


def listed(record: Record, field: str, where: str) -> list[Any]:
    """A list; empty where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: {field!r} is not a list; got {type(value).__name__}")
    return value


def identifiers(record: Record, field: str, where: str) -> list[str]:
    """A list of ids.

    Raises:
        DataError: with the index of the first that is none.
    """
    values = listed(record, field, where)
    # one look at most lists: a training file has tens of millions of ids
    if all(type(value) is str for value in values):
        joined = " ".join(values)
        if "\0" not in joined and joined.split() == values:
            return values
    return [
        identifier({field: value}, field, f"{where}: {field}[{index}]")
        for index, value in enumerate(values)
    ]


def texts(record: Record, field: str, where: str) -> tuple[str, ...]:
    """Strings, of a list or one alone; none where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    values = [value] if isinstance(value, str) else listed(record, field, where)
    for each in values:
        if not isinstance(each, str):
            raise DataError(f"{where}: {field!r} holds {quoted(each)}, expected strings")
    return tuple(values)


def number(record: Record, field: str, where: str) -> float:
    """A number that fp32 can hold; NaN where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return math.nan
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not (plain and -LARGEST_NUMBER <= value <= LARGEST_NUMBER):
        raise DataError(f"{where}: {field!r} is not a finite number; got {quoted(value)}")
    return float(value)


def text_or_tokens(value: Any, where: str) -> tuple[str, list[int] | None]:
    """Text and None, or no text and token ids: what Tevatron and Asyncval write into one field.

    Raises:
        DataError: it is neither a string nor a list of whole numbers from 0 to 2^31 - 1.
    """
    if isinstance(value, str):
        return value, None
    # types and limits by built-in functions: a corpus has a thousand million tokens
    whole = isinstance(value, list) and set(map(type, value)) <= {int}
    if whole and (not value or (min(value) >= 0 and max(value) < 2**31)):
        return "", value
    raise DataError(f"{where}: neither a string nor a list of token ids; got {quoted(value)}")


BYTES_AT_A_TIME = 1 << 22
LONGEST_TOKEN = len(r"\ud83d\ude00")  # that is no string: an escaped pair of surrogates
BLANK = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
CUT_STRING = "Unterminated string"


def array_items(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The objects of the JSON array in an open file; `path` is what messages call it.

    Raises:
        DataError: the array breaks off or is none, with line and byte.
    """
    return _ArrayText(path, file).items()


class _ArrayText:
    """The text that has been read and not yet parsed, and where in the file it starts."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._lines = 0  # line ends before the text
        self._bytes = 0  # bytes before the text
        self._ended = False

    def items(self) -> Iterator[Any]:
        if self._next_mark() != "[":
            raise self._error("expected a JSON array, which starts with '['")
        self._at += 1
        if self._next_mark() == "]":
            self._at += 1
        else:
            yield self._item()
            while (mark := self._next_mark()) == ",":
                self._at += 1
                self._next_mark()
                yield self._item()
            if not mark:
                raise self._error("the file breaks off before the array ends; get it again")
            if mark != "]":
                raise self._error(f"expected ',' or ']' after an item, got {mark!r}")
            self._at += 1
        if self._next_mark():
            raise self._error("text after the end of the array")

    def _next_mark(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _item(self) -> Any:
        while True:
            try:
                item, end = self._parse(self._text, self._at)
                if SURROGATE.search(self._text, self._at, end):
                    self._check_pairs(item)
            except json.JSONDecodeError as error:
                self._read_on_or_refuse(error)
            except ValueError as error:  # Python reads no number of more than 4,300 digits
                raise self._error("the item has a number of thousands of digits") from error
            except RecursionError as error:
                raise self._error("not JSON that can be read (nested too deeply)") from error
            else:
                self._at = end
                return item

    def _check_pairs(self, item: Any) -> None:
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise self._error(f"the item has half a surrogate pair ({half})") from error

    def _read_on_or_refuse(self, error: json.JSONDecodeError) -> None:
        unterminated = error.msg.startswith(CUT_STRING)
        if not unterminated and error.pos < len(self._text) - LONGEST_TOKEN:
            wrong = True
        elif self._more():
            return
        else:
            wrong = not unterminated and error.pos < len(self._text)
        if wrong:
            self._at = error.pos
            raise self._error(f"not JSON ({error.msg})") from error
        raise self._error("the file breaks off in the middle of an item; get it again") from error

    def _more(self) -> bool:
        """Read on and forget what is parsed; False at the end of the file."""
        if self._ended:
            return False
        parsed, self._text = self._text[: self._at], self._text[self._at :]
        self._at = 0
        if len(self._text) > LONGEST_LINE:
            raise self._error(f"an item is longer than {LONGEST_LINE >> 20} MiB")
        self._lines += parsed.count("\n")
        self._bytes += len(parsed.encode())
        # a long item is read in ever larger steps, because it is parsed anew after each
        raw = self._file.read(max(BYTES_AT_A_TIME, len(self._text)))
        try:
            self._text += self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()
            self._at = len(self._text)
            raise self._error(f"not UTF-8 text ({error.reason})") from error
        self._ended = not raw
        return True

    def _error(self, problem: str) -> DataError:
        before = self._text[: self._at]
        line = self._lines + before.count("\n") + 1
        byte = self._bytes + len(before.encode())
        return DataError(f"{self._path}:{line}: {problem} (at byte {byte:,})")
