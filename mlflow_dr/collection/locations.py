"""Paths within the name of a dataset, such as `asyncval:corpus?queries=dev.json`."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from mlflow_dr.errors import UsageError, quoted


def absolute(path: Path) -> Path:
    """The absolute path; links stay, because a split has the name that the user gave its file."""
    return path.expanduser().absolute()


def quoted_path(path: Path) -> str:
    """A path as in a URL: characters that have a meaning there are written as `%26` and so on."""
    return quote(os.fsencode(path))


def unquoted_path(text: str) -> Path:
    """The path that `quoted_path` wrote.

    Raises:
        UsageError: it has a NUL character.
    """
    if "\0" in text or "%00" in text:
        raise UsageError(f"{quoted(text)}: no file can have a NUL character in its name")
    return Path(os.fsdecode(unquote_to_bytes(text)))
