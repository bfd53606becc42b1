"""The user's cache: entries that are made once, and made again where they are damaged.

An entry is a directory. Its file `checksums` is written last and has the entry's own name and, for
each other file, the size, the checksum and the name. A process compares them when it first opens an
entry; after that it only looks whether the files were touched since. So a file that was cut off,
changed, removed, added or exchanged for one of another entry is never read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once, cache_dir, digest_of

LAYOUT = 2
"""Raise it when entries are kept in another way: those of the old way are then not found."""

CHECKSUMS = "checksums"
BYTES_AT_A_TIME = 1 << 20

State = tuple[tuple[str, int, int, int, int], ...]
_sound: dict[Path, State] = {}
"""The entries that this process has found sound, and the state of their files at that time."""


def cache_entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory of an entry, made now where the cache lacks it or has it damaged.

    Processes may ask for one entry at the same time: one makes it, the others wait. A damaged entry
    stays in its place until the new one is complete. Processes that have mapped its files keep
    them.

    Args:
        kind: the folder of the cache.
        key: names everything that the entry depends on.
        build: writes the files into a new directory, which it makes itself.
    """
    place = _place(kind, key)
    return build_once(place, lambda partial: _build(partial, place, build), _damage)


def sound_entry(kind: str, key: str) -> Path | None:
    """The directory of an entry; None where the cache lacks it or has it damaged."""
    place = _place(kind, key)
    return None if not place.exists() or _damage(place) else place


@contextmanager
def unchanged_cache() -> Iterator[None]:
    """Refuse what is done within if a file that this process has mapped was written to.

    Only the states of the files are looked at, before and after. An entry that was removed or
    replaced is no trouble: who has mapped it keeps the old files.

    Raises:
        DataError: an entry was damaged after it was opened.
    """
    _check_opened()
    try:
        yield
    finally:
        _check_opened()


def _check_opened() -> None:
    for place, state in list(_sound.items()):
        if not place.is_relative_to(cache_dir()) or not any(map(_is_written_to, state)):
            continue
        if damage := _damage(place):
            raise DataError(
                f"{place} in the cache was damaged while it was in use ({damage}); start again: it "
                "is then made again"
            )


def _is_written_to(before: tuple[str, int, int, int, int]) -> bool:
    """Whether a file that is still in its place has another size or time of change."""
    path, inode, size, changed_ns, _ = before
    try:
        now = Path(path).stat()
    except OSError:
        return False
    return now.st_ino == inode and (now.st_size, now.st_mtime_ns) != (size, changed_ns)


def file_checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, in hexadecimal: several GB/s; no cryptographic hash."""
    checksum = xxhash.xxh3_128()
    part = memoryview(bytearray(BYTES_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            checksum.update(part[:count])
    return checksum.hexdigest()


def _place(kind: str, key: str) -> Path:
    return cache_dir() / kind / digest_of(LAYOUT, kind, key)


def _build(partial: Path, place: Path, build: Callable[[Path], None]) -> None:
    build(partial)
    lines = "\n".join(_lines(partial, place))
    (partial / CHECKSUMS).write_text(lines, encoding="utf-8")
    _sound[place] = _state(partial, place)


def _damage(place: Path) -> str:
    """What is wrong with an entry; empty when it is sound."""
    try:
        state = _state(place, place)
        if _sound.get(place) == state:
            return ""
        if not (place / CHECKSUMS).is_file():
            return "it has no checksums"
        noted = (place / CHECKSUMS).read_bytes().decode(errors="replace").split("\n")
        found = _lines(place, place)
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    if noted != found:
        # what `checksums` says may be anything, so what is there is named first
        (first, *_) = [one for one in (*found, *noted) if (one in found) != (one in noted)] or found
        return f"{first.split(' ')[-1][:40]!r} is not as it was written"
    _sound[place] = state
    return ""


def _lines(room: Path, place: Path) -> list[str]:
    """What `checksums` says of the files that lie in `room` now."""
    files = {path.relative_to(room).as_posix(): path for path in _files(room)}
    files.pop(CHECKSUMS, None)
    sums = [f"{path.stat().st_size} {file_checksum(path)} {name}" for name, path in files.items()]
    return [f"{place.parent.name}/{place.name}", *sums]


def _state(room: Path, place: Path) -> State:
    """What changes whenever somebody writes or replaces a file; `room` is moved to `place`."""
    states = ((place / path.relative_to(room), path.stat()) for path in _files(room))
    return tuple(
        (str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for path, state in states
    )


def _files(room: Path) -> list[Path]:
    """The files of an entry by name, without hidden ones: file systems and desktops leave those."""
    paths = (Path(folder, name) for folder, _, names in os.walk(room) for name in names)
    return sorted(path for path in paths if not path.name.startswith(".") and path.is_file())
