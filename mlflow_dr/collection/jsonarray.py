"""One JSON array read item by item, so that memory holds one item and never the file.

DPR's training files are such arrays, of up to several gigabytes. The standard library's decoder
does the parsing; what is here decides whether it failed because the text ends in mid-item (then
more is read) or because it is wrong.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlflow_dr.errors import DataError
from mlflow_dr.files import LONGEST_LINE

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
