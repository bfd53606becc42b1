"""Names of datasets: paths in them, such as `asyncval:corpus?queries=dev.json`, and hub names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from mlflow_dr.errors import UsageError, quoted

HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<config>[\w.-]+))?"
    r"(@(?P<revision>[^\s:@+]+))?(:(?P<split>[\w.-]+))?"
)


class HubName(NamedTuple):
    """A name on the Hugging Face hub, such as `mteb/scifact@REVISION:test`.

    Attributes:
        repo: `owner/name`.
        config: which of several collections of the repository; empty for the only one.
        revision: a branch, tag or commit; None for the default branch.
        split: the only split that is meant; empty for all.
    """

    repo: str
    config: str
    revision: str | None
    split: str


def hub_name(text: str) -> HubName | None:
    """The parts of `OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`; None for any other text."""
    match = HUB_NAME.fullmatch(text)
    if match is None:
        return None
    return HubName(match["repo"], match["config"] or "", match["revision"], match["split"] or "")


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
