"""Text that is safe in a terminal: without control characters, secrets and very long lines.

Names of runs, folders and checkpoints come from other people. An escape sequence in a name could
write to the clipboard (OSC 52) or change the screen, and a bidirectional override could show
another name. Both are printed as Python writes them: `\\x1b`, `\\u202e`.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from typing import BinaryIO, TextIO

LONGEST_LINE = 480  # of an error or a warning, in characters; with its level it stays below 500
SHARE_OF_BEGINNING = 0.7  # of a shortened line; the other characters are its end
HIDDEN = "***"

_ALWAYS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_ALWAYS}]")  # a stream's: it may begin lines
_CONTROL_OR_END = re.compile(f"[{_ALWAYS}\r\n\t]")  # a name's
_MOVES = re.compile(r"[\r\n]*(\x1b\[A)*")  # what tqdm writes to reach the line of another bar

_URI = re.compile(r"\b([a-z][a-z0-9+.-]{0,40})://([^\s'\"]+)", re.IGNORECASE)
_QUERY_VALUE = re.compile(r"([^&=]+)=([^&]*)")
_SECRETS = "token|secret|password|passwd|pwd|signature|credential|api_?key|access_?key"
_SECRET_VALUE = re.compile(rf"\b([\w.-]{{0,40}}(?:{_SECRETS})=)[^&\s'\",;]+", re.IGNORECASE)


def printable(text: str) -> str:
    """A name on one line, with control characters and line ends as Python writes them."""
    return _CONTROL_OR_END.sub(_escaped, text) if not text.isprintable() else text


def without_secrets(text: str) -> str:
    """The text without passwords and tokens, and without the values in the queries of URIs.

    In `https://TOKEN@host` and `https://user:password@host` the user is hidden, too, because either
    part may be a token. In a database's URI only the password is hidden.
    """
    if "://" in text:
        text = _URI.sub(_shown_uri, text)
    return _SECRET_VALUE.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def one_line_of(text: str, longest: int = LONGEST_LINE) -> str:
    """A message on one line of limited length; a longer one loses its middle."""
    return shortened(printable(" ".join(without_secrets(text).split())), longest)


def log_line(text: str, longest: int) -> str:
    """A message on one line of limited length; runs of spaces are kept."""
    return shortened(printable(without_secrets(text)), longest)


def shortened(text: str, longest: int = LONGEST_LINE) -> str:
    """A message of limited length; a longer one loses its middle.

    The start says what is wrong and where, and the end says what to do.
    """
    if len(text) <= longest:
        return text
    beginning = int(longest * SHARE_OF_BEGINNING)
    return f"{text[:beginning]} ... {text[beginning + 5 - longest :]}"


def guard_streams() -> None:
    """Escape control characters and hide secrets in everything that this process prints.

    Characters that the stream's encoding does not have are escaped, too, and raise no error.
    """
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


class _Guarded(io.TextIOWrapper):
    """A text stream that escapes control characters and hides secrets."""

    def write(self, text: str, /) -> int:
        shown = without_secrets(text)
        if not _MOVES.fullmatch(shown):
            shown = _CONTROL.sub(_escaped, shown)
        super().write(shown)
        return len(text)

    def close(self) -> None:
        """Flush, and leave the buffer open, which belongs to another stream."""
        if not self.buffer.closed:
            self.flush()


def _guarded(stream: TextIO) -> TextIO:
    if isinstance(stream, _Guarded) or not hasattr(stream, "buffer"):
        return stream
    stream.flush()
    line_buffering = getattr(stream, "line_buffering", False)
    return _Guarded(
        _buffer(stream),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
        write_through=getattr(stream, "write_through", False),
    )


def _buffer(stream: TextIO) -> BinaryIO:
    """A stream's bytes; opened again if the descriptor was a file and is now a pipe."""
    try:
        if stream.buffer.seekable():
            stream.buffer.tell()
        return stream.buffer
    except OSError:
        return os.fdopen(stream.fileno(), "wb", closefd=False)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _shown_uri(match: re.Match[str]) -> str:
    scheme, rest = match[1], match[2]
    user = rest.partition("@")[0]
    if scheme.lower() in ("http", "https"):
        server, slash, path = rest.partition("/")
        _, has_user, host = server.rpartition("@")
        rest = f"{HIDDEN}@{host}{slash}{path}" if has_user else rest
    elif "@" in rest and ":" in user and "/" not in user.partition(":")[0]:
        # a password that was not quoted may contain any character, also `#` and `?`
        rest = f"{user.partition(':')[0]}:{HIDDEN}@{rest.rpartition('@')[2]}"
    rest, fragment, after = rest.partition("#")
    rest, mark, query = rest.partition("?")
    if query:
        values = _QUERY_VALUE.sub(rf"\1={HIDDEN}", query)
        query = values if "=" in query else HIDDEN
    return f"{scheme}://{rest}{mark}{query}{fragment}{after}"


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells under one another, a line each, whatever the cells hold."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def time_span(seconds: float) -> str:
    """Seconds in a readable unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def byte_count(count: float) -> str:
    """A number of bytes in a readable unit, as disks are sold: 1 GB is 10^9 bytes."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
