"""The user's cache: entries that are made once, and made again if they are damaged.

An entry is a directory. Its file `checksums` is written last. It has the entry's name and the size,
checksum and name of each other file. The process that first opens an entry after a start of the
machine compares them, and notes the state of the files (inodes, sizes and times of change) in the
hidden file `.checked`. Processes that open the entry later compare the state only, because
reading gigabytes from disk takes minutes. So a file that was cut off, changed, removed, added or
taken from another entry is never read.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from filelock import BaseFileLock, FileLock, Timeout

from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once, cache_dir, digest_of

LAYOUT = 2
"""To be increased when the layout of entries changes, so that older entries are not found."""

CHECKSUMS = "checksums"
CHECKED = ".checked"
"""Its time of change is when a process last opened the entry."""
ABOUT = ".about"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one after each start of a machine; only Linux has it."""
BYTES_AT_A_TIME = 1 << 20

State = tuple[tuple[str, int, int, int, int], ...]
_sound: dict[Path, State] = {}
"""The undamaged entries that this process has opened -> the state of their files at that time."""


def cache_entry(kind: str, key: str, build: Callable[[Path], None], about: str = "") -> Path:
    """The directory of an entry; it is made first if it is missing or damaged.

    If several processes ask for an entry at the same time, one makes it and the others wait. A
    damaged entry stays until the new one is complete, and processes that have mapped its files keep
    them.

    Args:
        kind: the folder of the cache.
        key: has everything that the entry depends on.
        build: makes a directory at the path that it gets, and writes the files into it.
        about: what the entry is, for `mlflow-dr cache`.
    """
    entry = _entry_path(kind, key)
    return build_once(entry, lambda partial: _build(partial, entry, build, about), _damage)


def about_entry(entry: Path | None) -> str:
    """What an entry was said to be when it was made; empty if nothing was said, and for None."""
    if entry is None or not (entry / ABOUT).is_file():
        return ""
    try:
        return (entry / ABOUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def sound_entry(kind: str, key: str) -> Path | None:
    """The directory of an entry; None if it is missing or damaged."""
    entry = _entry_path(kind, key)
    return None if not entry.exists() or _damage(entry) else entry


def remove_entry(kind: str, key: str) -> None:
    """Remove an entry that is no longer needed; it stays if another process is making it.

    Processes that have mapped its files keep them.
    """
    entry = _entry_path(kind, key)
    with suppress(Timeout, OSError):
        remove_under(FileLock(f"{entry}.lock", blocking=False), entry)


def remove_under(lock: BaseFileLock, entry: Path) -> None:
    """Remove an entry; it is renamed under its lock, so that no process finds a part of it.

    Raises:
        Timeout: another process has the lock.
        OSError: the entry is missing or cannot be removed.
    """
    with lock:
        target = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        entry.rename(target)
        shutil.rmtree(target)


@contextmanager
def unchanged_cache() -> Iterator[None]:
    """Fail if a file that this process has mapped is written to, before or in the block.

    Only sizes and times are compared. An entry may be removed or replaced, because a process that
    has mapped it keeps the old files.

    Raises:
        DataError: an entry was damaged after it was opened.
    """
    _check_opened()
    try:
        yield
    finally:
        _check_opened()


def _check_opened() -> None:
    for entry, state in list(_sound.items()):
        if not entry.is_relative_to(cache_dir()) or not any(map(_is_written_to, state)):
            continue
        if damage := _damage(entry):
            raise DataError(
                f"{entry} in the cache was damaged while it was in use ({damage}); run the command "
                "again, which makes the entry again"
            )


def _is_written_to(before: tuple[str, int, int, int, int]) -> bool:
    """Whether a file that still exists has another size or time of change."""
    path, inode, size, changed_ns, _ = before
    try:
        now = Path(path).stat()
    except OSError:
        return False
    return now.st_ino == inode and (now.st_size, now.st_mtime_ns) != (size, changed_ns)


def file_checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, in hexadecimal; it is fast and not cryptographic."""
    checksum = xxhash.xxh3_128()
    part = memoryview(bytearray(BYTES_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            checksum.update(part[:count])
    return checksum.hexdigest()


def _entry_path(kind: str, key: str) -> Path:
    return cache_dir() / kind / digest_of(LAYOUT, kind, key)


def _build(partial: Path, entry: Path, build: Callable[[Path], None], about: str) -> None:
    build(partial)
    if about:
        (partial / ABOUT).write_text(about, encoding="utf-8", errors="replace")
    lines = "\n".join(_lines(partial, entry))
    (partial / CHECKSUMS).write_text(lines, encoding="utf-8")
    _note(entry, _state(partial, entry), partial)


def _damage(entry: Path) -> str:
    """What is wrong with an entry; an empty string if nothing is."""
    try:
        state = _state(entry, entry)
        if _sound.get(entry) == state:
            return ""
        if _was_checked(entry, state):
            _sound[entry] = state
            with suppress(OSError):  # another user's
                os.utime(entry / CHECKED)
            return ""
        if not (entry / CHECKSUMS).is_file():
            return "it has no checksums"
        stored = (entry / CHECKSUMS).read_bytes().decode(errors="replace").split("\n")
        actual = _lines(entry, entry)
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    if stored != actual:
        # files that exist are named first, because `checksums` itself may be damaged
        lines = [
            line for line in (*actual, *stored) if (line in actual) != (line in stored)
        ] or actual
        return f"{lines[0].split(' ')[-1][:40]!r} is not as it was written"
    _note(entry, state, entry)
    return ""


def _note(entry: Path, state: State, folder: Path) -> None:
    """Note that an entry, whose files are in `folder` now, is undamaged."""
    _sound[entry] = state
    if seen := _seen(state):
        with suppress(OSError):  # a cache that this user cannot write to is checked by each process
            (folder / CHECKED).write_text(seen, encoding="utf-8")


def _was_checked(entry: Path, state: State) -> bool:
    """Whether a process has found these files undamaged since the machine was started."""
    try:
        return (entry / CHECKED).read_text(encoding="utf-8", errors="replace") == _seen(state)
    except OSError:
        return False


def _seen(state: State) -> str:
    """Names the state of files on this machine since its start; empty if that cannot be known.

    After a start the files are read again, because a machine that has lost its power may have lost
    what was not on its disk yet.
    """
    try:
        return digest_of(BOOT_ID.read_text(encoding="utf-8"), state)
    except OSError:
        return ""


def _lines(folder: Path, entry: Path) -> list[str]:
    """The lines of `checksums` for the files that are now in `folder`."""
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    files.pop(CHECKSUMS, None)
    sums = [f"{path.stat().st_size} {file_checksum(path)} {name}" for name, path in files.items()]
    return [f"{entry.parent.name}/{entry.name}", *sums]


def _state(folder: Path, entry: Path) -> State:
    """Names, inodes, sizes and times of the files of `folder`, which is renamed to `entry`."""
    states = ((entry / path.relative_to(folder), path.stat()) for path in _files(folder))
    return tuple(
        (str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for path, state in states
    )


def _files(directory: Path) -> list[Path]:
    """The files of an entry by name, without hidden ones, which file systems and desktops add."""
    paths = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sorted(path for path in paths if not path.name.startswith(".") and path.is_file())
