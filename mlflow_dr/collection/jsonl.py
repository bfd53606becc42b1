"""Files of records: JSON lines, one JSON array, Parquet or CSV; all but Parquet also as `.gz`.

The types of a record's fields are those of a `msgspec.Struct`; msgspec checks them as it decodes.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.errors import LONGEST_QUOTE, DataError, quoted
from mlflow_dr.files import BYTE_ORDER_MARK, LONGEST_LINE, opened, read_lines
from mlflow_dr.terminal import shortened

log = logging.getLogger(__name__)

Id = str | int
"""An id in a file; `checked_id` makes it a string."""
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TextOrTokens = str | list[Token]
Score = Annotated[float, msgspec.Meta(ge=-3.4e38, le=3.4e38)]
"""A number that fp32 can hold."""

T = TypeVar("T")
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

CSV = (".csv", ".csv.gz")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", *CSV)
UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".incomplete", ".crdownload", ".download")
SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")
BYTES_TO_PEEK = 1024
ROWS_AT_A_TIME = 1024

BYTES_AT_A_TIME = 1 << 22
LONGEST_TOKEN = len(r"\ud83d\ude00")  # of those that are not strings or numbers
BLANK = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_records(path: Path, record_type: type[T]) -> Iterator[tuple[str, T]]:
    """The records of a file, one at a time, each with its location for messages.

    The location is `file:line` in JSON lines, and `file[index]`, from 0, in other files.

    Args:
        path: JSON lines, a JSON array or CSV with a header, `.gz` or plain, or Parquet.
        record_type: a `msgspec.Struct`, or `dict`.

    Raises:
        DataError: the file is missing, truncated or damaged, or a record is not of this type.
    """
    if path.suffix == ".parquet":
        items = _parquet_rows(path)
    elif path.name.endswith(CSV):
        items = _csv_rows(path)
    elif _is_array(path):
        items = _array_items(path)
    else:
        yield from _json_lines(path, record_type)
        return
    for index, item in enumerate(items):
        location = f"{path}[{index}]"
        try:
            record = msgspec.convert(item, record_type)
        except MALFORMED as error:
            raise DataError(f"{location}: {_fault(error, item)}") from error
        yield location, record


def _json_lines(path: Path, record_type: type[T]) -> Iterator[tuple[str, T]]:
    decode = msgspec.json.Decoder(record_type).decode
    file = str(path)
    for number, line in read_lines(path):
        try:
            if not line.isascii():
                line.decode()  # msgspec does not check the bytes of fields that it skips
            record = decode(line)
        except MALFORMED as error:
            raise DataError(f"{path}:{number}: {_fault(error, line)}") from error
        yield f"{file}:{number}", record


def _fault(error: Exception, raw: Any) -> str:
    """What is wrong with a record, such as `positive_passages[0].title: expected ...`."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read (nested too deeply)"
    if not isinstance(error, msgspec.ValidationError):
        return f"not JSON ({error})"
    reason, _, field = str(error).partition(" - at `$")
    reason = reason.replace("Object missing required field", "no").replace("`", "'")
    if reason.startswith("no ") and not field:
        reason += f"; it has {fields_of(msgspec.json.decode(raw) if type(raw) is bytes else raw)}"
    return f"{field.strip('.`')}: {reason.replace('Expected', 'expected')}".removeprefix(": ")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as lines of JSON."""
    with path.open("wb") as file:
        for record in records:
            file.write(msgspec.json.encode(record) + b"\n")


def fields_of(record: Mapping[str, Any]) -> str:
    """The names of a record's fields, for messages."""
    return shortened(", ".join(record), LONGEST_QUOTE) or "(none)"


def checked_id(value: Id, location: str) -> str:
    """An id as a string that files of judgements and trec_eval can name.

    Raises:
        DataError: it is empty, or has white space at its start or end, or a NUL character.
    """
    text = value if isinstance(value, str) else str(value)
    if not text:
        raise DataError(f"{location}: an id is empty; expected a string such as 'p1'")
    if "\0" in text or text != text.strip():
        fault = "a NUL character" if "\0" in text else "white space at its start or end"
        raise DataError(
            f"{location}: id {quoted(text)} has {fault}; remove it, because files of judgements "
            "and trec_eval cannot name such an id"
        )
    return text


def first_id(values: Sequence[Id | None], location: str) -> str:
    """The first id that is given, checked; empty where none is."""
    for value in values:
        if value is not None and value != "":
            return checked_id(value, location)
    return ""


def answers_of(value: list[str] | str | None) -> tuple[str, ...]:
    """Short answers, which files have as a list or as one string."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def text_and_tokens(value: TextOrTokens) -> tuple[str, list[int] | None]:
    """Text and None, or no text and token ids: Tevatron and Asyncval have one field for both."""
    return (value, None) if isinstance(value, str) else ("", value)


def state_of(path: Path) -> str:
    """Names a file and its present contents; the key of a cache.

    The key has the path, the size, and two times: of the last change of the contents (`mtime`) and
    of the file's status (`ctime`). Programs set `mtime` when they copy or unpack a file. They
    cannot set `ctime`, so a file that was replaced by another of equal size and `mtime` has a new
    key. A file that was only linked or given other rights has a new key, too, and is read again. A
    file system without a `ctime` of its own, such as a mounted object store, hides a replacement
    of equal size and `mtime`. The inode is left out because some mounts renumber files.

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
    """The files of records in a folder, without hidden ones, in the order of their names.

    Broken links are included, so that `check_complete` can refuse them. With `warn`, unfinished
    downloads are reported in a warning.

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
            log.warning("%s: skipped, because it is an unfinished download", file)
    return [file for file in files if file.name.endswith(suffixes) and not file.is_dir()]


def check_complete(files: Sequence[Path]) -> None:
    """Refuse files of a folder when some are missing.

    Raises:
        DataError: a link is broken, or a file is missing from a numbered series such as
            `x-00000-of-00003.jsonl`.
    """
    shards: dict[tuple[Path, str, str], dict[int, str]] = defaultdict(dict)
    for file in files:
        check_link(file)
        if match := SHARD.fullmatch(file.name):
            shards[file.parent, match[1], match[3]][int(match[2][-9:])] = file.name
    for (folder, start, total), names in shards.items():
        count = int(total[-9:])
        first = 1 if count in names else 0  # some count from 1
        missing = next((n for n in range(first, first + count) if n not in names), None)
        if missing is not None:
            _, number, _, end = SHARD.fullmatch(next(iter(names.values()))).groups()  # type: ignore[union-attr]
            name = f"{start}{missing:0{len(number)}}-of-{total}{end}"
            raise DataError(
                f"{folder}: {name} is missing; there are {len(names)} of {count} such files"
            )


def check_link(path: Path) -> None:
    """Refuse a broken link.

    Raises:
        DataError: with the target of the link.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: a link to {path.readlink()}, which does not exist; bring the file back or "
            "remove the link"
        )


def _parquet_rows(path: Path) -> Iterator[Any]:
    index = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    yield row
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


def _csv_rows(path: Path) -> Iterator[Any]:
    """The rows of a table with a header; each has a text in each column."""
    csv.field_size_limit(LONGEST_LINE)
    index = 0
    with opened(path) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}[{index}]: the row has more or fewer cells than the header "
                        f"({', '.join(rows.fieldnames or ())})"
                    )
                yield row
                index += 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}[{index}]: not CSV ({error})") from error


def _is_array(path: Path) -> bool:
    with suppress(DataError), opened(path) as file:  # reading its lines reports what is wrong
        return file.read(BYTES_TO_PEEK).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
    return False


def _array_items(path: Path) -> Iterator[Any]:
    """The items of a JSON array, one at a time, so that memory never holds the file."""
    with opened(path) as file:
        yield from _ArrayText(path, file).items()


class _ArrayText:
    """The text of a JSON array that was read and not yet parsed, and its position in the file.

    DPR's training files are such arrays, of up to several gigabytes. The standard library's parser
    does the work; this class reads more text when the parser stops because an item is incomplete.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._position = 0
        self._lines = 0  # line ends before the text
        self._bytes = 0  # bytes before the text
        self._ended = False

    def items(self) -> Iterator[Any]:
        self._next_mark()
        self._position += 1  # "[", as `_is_array` has seen
        if self._next_mark() != "]":
            yield self._item()
            while (mark := self._next_mark()) == ",":
                self._position += 1
                self._next_mark()
                yield self._item()
            if mark != "]":
                raise self._error(
                    f"expected ',' or ']' after an item, got {mark!r}"
                    if mark
                    else "the file breaks off before the array ends; get it again"
                )
        self._position += 1
        if self._next_mark():
            raise self._error("text after the end of the array")

    def _next_mark(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            self._position = BLANK.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def _item(self) -> Any:
        while True:
            try:
                item, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                near_end = error.pos >= len(self._text) - LONGEST_TOKEN
                if (is_cut or near_end) and self._read_more():
                    continue
                if is_cut or error.pos == len(self._text):
                    problem = "the file breaks off in the middle of an item; get it again"
                    raise self._error(problem) from error
                self._position = error.pos
                raise self._error(f"not JSON ({error.msg})") from error
            except RecursionError as error:
                raise self._error("not JSON that can be read (nested too deeply)") from error
            except ValueError as error:  # Python reads no number of more than 4,300 digits
                raise self._error("the item has a number of thousands of digits") from error
            if SURROGATE.search(self._text, self._position, end):
                self._check_pairs(item)
            self._position = end
            return item

    def _check_pairs(self, item: Any) -> None:
        """Refuse half a surrogate pair, which Python's parser accepts and UTF-8 does not have."""
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise self._error(f"the item has half a surrogate pair ({half})") from error

    def _read_more(self) -> bool:
        """Drop the parsed text and read more; False at the end of the file."""
        if self._ended:
            return False
        parsed, self._text = self._text[: self._position], self._text[self._position :]
        self._position = 0
        if len(self._text) > LONGEST_LINE:
            raise self._error(f"an item is longer than {LONGEST_LINE >> 20} MiB")
        self._lines += parsed.count("\n")
        self._bytes += len(parsed.encode())
        # a long item is parsed again after each step, so the steps grow
        raw = self._file.read(max(BYTES_AT_A_TIME, len(self._text)))
        try:
            self._text += self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()
            self._position = len(self._text)
            raise self._error(f"not UTF-8 text ({error.reason})") from error
        self._ended = not raw
        return True

    def _error(self, problem: str) -> DataError:
        before = self._text[: self._position]
        line = self._lines + before.count("\n") + 1
        byte = self._bytes + len(before.encode())
        return DataError(f"{self._path}:{line}: {problem} (at byte {byte:,})")
