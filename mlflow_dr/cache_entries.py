"""What is in the user's cache, how big it is, and removing it.

Only what this package makes is listed and removed, whatever else is in the folder.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from mlflow_dr.cache import CHECKED, about_entry, remove_under
from mlflow_dr.errors import UsageError
from mlflow_dr.files import cache_dir
from mlflow_dr.process_tree import files_in_use

KINDS: Mapping[str, str] = {
    "corpora": "passages, as Arrow files",
    "tokens": "token tables",
    "examples": "training examples",
    "hub": "passages of the Hugging Face hub, as Arrow files",
    "downloads": "downloaded files",
    "stores": "document stores",
    "bm25": "BM25 indexes",
    "top_passages": "rankings for subsets and mining",
    "fidelity": "values of studies of subsets",
    "loaders": "encoders and figures of loader studies",
    "reader": "data of readers",
    "imported": "encoders of DPR checkpoints",
    "jax": "programs compiled by JAX",
    "demo": "the demo collection",
    "demo-qa": "the demo collection of questions",
}
PROGRAMS = "jax"  # JAX keeps files here; all of them are one entry
NAME = re.compile(r"(study-)?[0-9a-f]{16}")
REMAINS = re.compile(r"\.((study-)?[0-9a-f]{16})\..+")
AGE = re.compile(r"(\d+)([hdw])")
SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}


class CacheEntry(NamedTuple):
    """An entry of the cache.

    Attributes:
        kind: the folder of the cache.
        name: of the entry.
        path: of the entry, a directory.
        bytes: of its files.
        used: when a process last opened it, in seconds since 1970; where nobody notes that, when
            it was made.
        about: what it is; may be empty.
    """

    kind: str
    name: str
    path: Path
    bytes: int
    used: float
    about: str


def cache_entries() -> list[CacheEntry]:
    """The entries of the cache by kind, the largest first."""
    found = [
        entry for kind in KINDS if (cache_dir() / kind).is_dir() for entry in _entries_of(kind)
    ]
    order = list(KINDS)
    return sorted(found, key=lambda entry: (order.index(entry.kind), -entry.bytes, entry.name))


def _entries_of(kind: str) -> Iterator[CacheEntry]:
    folder = cache_dir() / kind
    if kind == PROGRAMS:
        if entry := _entry(kind, PROGRAMS, folder):
            yield entry
        return
    for path in sorted(folder.iterdir()):
        remains = REMAINS.fullmatch(path.name)
        if path.is_dir() and (remains or NAME.fullmatch(path.name)):
            about = "unfinished" if remains else _about(kind, path)
            if entry := _entry(kind, remains[1] if remains else path.name, path, about):
                yield entry


def _entry(kind: str, name: str, path: Path, about: str = "") -> CacheEntry | None:
    """The entry at a path; None if another process has removed it meanwhile, or it is empty."""
    with suppress(OSError):
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        noted = path / CHECKED
        used = (noted if noted.exists() else path).stat().st_mtime
        return CacheEntry(kind, name, path, sum(sizes), used, about) if sizes else None
    return None


def _about(kind: str, path: Path) -> str:
    if kind == "downloads":
        return ", ".join(sorted(file.name for file in path.iterdir() if file.is_file()))
    if path.name.startswith("study-"):
        return "figures of a study that was interrupted"
    return about_entry(path)


def parse_age(text: str) -> float:
    """The seconds of an age such as 12h, 30d or 2w.

    Raises:
        UsageError: it is none.
    """
    match = AGE.fullmatch(text)
    if not match:
        raise UsageError(f"{text[:40]!r} is no age; expected hours, days or weeks: 12h, 30d or 2w")
    return int(match[1]) * SECONDS[match[2]]


def chosen_entries(names: Sequence[str], older_than: str | None = None) -> list[CacheEntry]:
    """The entries of the given names that were not used for some time.

    Args:
        names: kinds, names of entries or their first characters; none stands for all entries.
        older_than: an age, as `parse_age` takes it.

    Raises:
        UsageError: a name that fits nothing, or a wrong age.
    """
    entries = cache_entries()
    for name in names:
        if name not in KINDS and not any(entry.name.startswith(name) for entry in entries):
            raise UsageError(
                f"the cache has no entry {name[:80]!r}; `mlflow-dr cache` lists what it has"
            )
    latest = time.time() - parse_age(older_than) if older_than else None
    return [
        entry
        for entry in entries
        if (not names or entry.kind in names or entry.name.startswith(tuple(names)))
        and (latest is None or entry.used < latest)
    ]


def remove_entries(entries: Sequence[CacheEntry]) -> Iterator[tuple[CacheEntry, str]]:
    """Remove entries that no process uses.

    An entry is renamed under its lock and then removed, so that no process finds a part of it.

    Yields:
        Each entry, and why it was kept; an empty text if it was removed.
    """
    in_use = files_in_use(cache_dir())
    for entry in entries:
        users = [process for path, process in in_use.items() if _is_below(path, entry.path)]
        if users:
            yield entry, f"process {users[0]} uses it"
            continue
        yield entry, _remove(entry)


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder.resolve())


def _remove(entry: CacheEntry) -> str:
    study = cache_dir() / "loaders.lock"
    own = entry.path.with_name(f"{entry.name}.lock")
    lock = FileLock(study if entry.name.startswith("study-") else own, blocking=False)
    try:
        remove_under(lock, entry.path)
    except Timeout:
        return "another process is making it"
    except FileNotFoundError:
        return ""  # another process was faster
    except OSError as error:
        return f"it cannot be removed: {error.strerror}"
    return ""
