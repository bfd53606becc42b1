"""Files that are complete or absent: everything is written under another name and then renamed."""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeAlias

from filelock import BaseFileLock, FileLock, Timeout

from mlflow_dr.errors import DataError

log = logging.getLogger(__name__)

PathLike: TypeAlias = str | os.PathLike[str]

CACHE_VARIABLE = "MLFLOW_DR_CACHE"
SCRATCH = "mlflow_dr-scratch-"
LOCK = ".lock"
ALMOST_NOTHING = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_LINE = 1 << 26
"""Bytes of the longest line that is read; a few MiB of `.gz` can hold a line that fills memory."""


def cache_dir() -> Path:
    """The user's cache directory: `$MLFLOW_DR_CACHE`, else `$XDG_CACHE_HOME/mlflow_dr`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlflow_dr"


def is_path(text: str) -> bool:
    """Whether a file or folder has this name; also False for a text that cannot be a path."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home, a NUL character
        return False


def nearest_existing(path: Path) -> Path:
    """A path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def digest_of(*parts: object) -> str:
    """A short hexadecimal digest (16 characters of SHA-256) of the parts' text."""
    text = "\x00".join(str(part) for part in parts)
    # names of files need not be UTF-8
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sizes_and_digests(directory: Path, left_out: str) -> dict[str, dict[str, int | str]]:
    """The files of a directory and below it: name -> `bytes` and `sha256`.

    Args:
        directory: of the files.
        left_out: name of a file at its top that is not listed, such as the list itself.
    """
    return {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / left_out
    }


def build_once(
    target: Path,
    build: Callable[[Path], None],
    damage: Callable[[Path], str] = lambda target: "",
) -> Path:
    """Make a file or directory once, however many processes ask for it.

    `build` writes to a path in the same folder. The result is renamed to `target` when `build`
    returns, and removed when it raises, so the target is complete or absent. The remains of a
    process that was killed are removed by the next process.

    Args:
        target: the file or directory.
        build: makes it at the path that it gets.
        damage: says what is wrong with an existing target; an empty string means nothing. A damaged
            target is made again, with a warning, and removed when the new one is complete.
    """
    if target.exists() and not damage(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        for remains in target.parent.glob(f".{glob.escape(target.name)}.*"):
            shutil.rmtree(remains, ignore_errors=True)
        damaged = damage(target) if target.exists() else ""
        if damaged:
            log.warning("%s in the cache is damaged (%s); it is made again", target, damaged)
        if damaged or not target.exists():
            with atomic_write(target) as partial:
                build(partial)
                if os.path.lexists(target):
                    target.rename(partial.parent / "damaged")
    return target


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A new path that is renamed to `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial = folder / target.name
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def grant_umask_modes(directory: Path) -> None:
    """Give each file below a directory the permissions that the umask allows.

    safetensors writes with mode 0600, so other users of a shared store could not read its files.
    """
    probe = directory / f".mode-{uuid.uuid4().hex}"
    probe.touch()  # os.umask can only be read by setting it, which other threads would see
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            own = stat.S_IMODE(path.stat().st_mode)
            if own | mode != own:
                with suppress(OSError):  # another user's file, or a file system without modes
                    path.chmod(own | mode)


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A path for a temporary directory, which is removed afterwards.

    The remains of processes that were killed are removed first: their lock files are not locked any
    more. A lock file is made before its directory and removed after it, so that no directory is
    ever without one. The block may be entered in one thread and left in another.

    Args:
        parent: the folder it is in; the system's folder for temporary files when None.
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent)
    lock = _fresh_lock(parent)
    folder = _locked_folder(lock)
    try:
        folder.mkdir(mode=0o700)
        yield folder / "files"
    finally:
        _remove(lock)
        lock.release()


def _fresh_lock(parent: Path) -> BaseFileLock:
    """A lock that is held, under a new name."""
    while True:
        path = parent / f"{SCRATCH}{uuid.uuid4().hex}{LOCK}"
        lock = FileLock(path, blocking=False, thread_local=False)
        with suppress(Timeout):  # another process removes it before it is locked
            lock.acquire()
            if path.exists():
                return lock
            lock.release()


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{SCRATCH}*{LOCK}"):
        try:
            with FileLock(path, blocking=False) as lock:
                _remove(lock)
        except (OSError, Timeout):
            continue  # in use, another user's, or already removed


def _remove(lock: BaseFileLock) -> None:
    shutil.rmtree(_locked_folder(lock), ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)


def _locked_folder(lock: BaseFileLock) -> Path:
    return Path(lock.lock_file).with_suffix("")


def is_full(error: BaseException, directory: Path) -> bool:
    """Whether a write to a directory failed because the disk is full.

    Some libraries say so only in the text of an error, or not at all.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "No space left" in str(error) or shutil.disk_usage(directory).free < ALMOST_NOTHING


@contextmanager
def opened(path: Path, position: Callable[[], str] | None = None) -> Iterator[IO[bytes]]:
    """A file for reading, decompressed if its name ends in `.gz`.

    Args:
        path: the file.
        position: gives file and line for messages about damage; the path when None.

    Raises:
        DataError: the file is missing, or its compression is damaged; also inside the block.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        at = position() if position else path
        raise DataError(
            f"{at}: the compressed file is damaged or truncated ({error}); download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines (from 1, without line ends) of a text file, `.gz` or plain.

    Raises:
        DataError: the file is missing, cannot be read or is damaged, or a line is longer than
            `LONGEST_LINE`.
    """
    number = 0
    with opened(path, lambda: f"{path}:{number + 1}") as file:
        for number, line in bounded_lines(path, file):
            if stripped := line.strip():
                yield number, stripped


def bounded_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """All lines of an open file, numbered from 1, without a byte order mark at the start.

    Raises:
        DataError: a line is longer than `LONGEST_LINE`; only that much of it is read.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; expected "
                "a passage, query or judgement on each line"
            )
        yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def decoded(line: bytes, path: Path, number: int) -> str:
    """The line as text; a DataError with file:line when it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
