"""Files that are whole or not there: everything is written beside its place and renamed into it."""

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
from typing import IO

from filelock import BaseFileLock, FileLock, Timeout

from mlflow_dr.errors import DataError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "MLFLOW_DR_CACHE"
SCRATCH = "mlflow_dr-scratch-"
LOCK = ".lock"
ALMOST_NOTHING = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_LINE = 1 << 26
"""Bytes of the longest line that is read; a few MiB of `.gz` can hold one that fills the memory."""


def cache_dir() -> Path:
    """The user's cache directory: `$MLFLOW_DR_CACHE`, else `$XDG_CACHE_HOME/mlflow_dr`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlflow_dr"


def is_path(text: str) -> bool:
    """Whether there is a file or folder of this name; False also for what no path can be called."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home, a NUL character
        return False


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


def build_once(
    target: Path,
    build: Callable[[Path], None],
    damage: Callable[[Path], str] = lambda target: "",
) -> Path:
    """Make `target` (a file or directory) with `build`, once, whatever number of processes ask.

    `build` gets a path beside the target and writes there; the result is renamed into place when
    `build` returns and removed when it raises, so that the target is whole or absent. What a killed
    process left of its try is removed by the next one.

    Args:
        target: what is made.
        build: makes it at another path.
        damage: says what is wrong with a target that exists, empty when nothing is. A damaged
            target is made again, with a warning, and removed when the new one is complete.
    """
    if target.exists() and not damage(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
            shutil.rmtree(left, ignore_errors=True)
        damaged = damage(target) if target.exists() else ""
        if damaged:
            log.warning("%s in the cache is damaged (%s); it is made again", target, damaged)
        if damaged or not target.exists():
            with written_beside(target) as partial:
                build(partial)
                if os.path.lexists(target):
                    target.rename(partial.parent / "damaged")
    return target


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh path next to `target` that takes its place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial = room / target.name
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def grant_umask_modes(directory: Path) -> None:
    """Give each file below a directory the permissions that the umask allows.

    safetensors writes with mode 0600, which keeps other users of a shared store from reading.
    """
    probe = directory / f".mode-{uuid.uuid4().hex}"
    probe.touch()  # setting the umask, the only way to ask for it, would be seen by other threads
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            known = stat.S_IMODE(path.stat().st_mode)
            if known | mode != known:
                with suppress(OSError):  # of another owner, or a file system without modes
                    path.chmod(known | mode)


@contextmanager
def scratch() -> Iterator[Path]:
    """A place for a fresh temporary directory, which is removed afterwards if it was made.

    What killed processes have left behind is removed first: theirs is no longer locked. The lock
    lies beside the directory, is there before it and goes after it, so that nothing is left without
    one at any moment. It may be made in one thread and left in another.
    """
    _sweep()
    lock = _fresh_lock()
    room = _beside(lock)
    try:
        room.mkdir(mode=0o700)
        yield room / "files"
    finally:
        _remove(lock)
        lock.release()


def _fresh_lock() -> BaseFileLock:
    """A lock that is held, of a name that no other had."""
    while True:
        path = Path(tempfile.gettempdir(), f"{SCRATCH}{uuid.uuid4().hex}{LOCK}")
        lock = FileLock(path, blocking=False, thread_local=False)
        with suppress(Timeout):  # another process sweeps it before it is locked
            lock.acquire()
            if path.exists():
                return lock
            lock.release()


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*{LOCK}"):
        try:
            with FileLock(path, blocking=False) as lock:
                _remove(lock)
        except (OSError, Timeout):
            continue  # in use, another user's, or gone by now


def _remove(lock: BaseFileLock) -> None:
    shutil.rmtree(_beside(lock), ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)


def _beside(lock: BaseFileLock) -> Path:
    return Path(lock.lock_file).with_suffix("")


def is_full(error: BaseException, directory: Path) -> bool:
    """Whether a write to a directory failed for want of room; libraries do not say so by type."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "No space left" in str(error) or shutil.disk_usage(directory).free < ALMOST_NOTHING


@contextmanager
def opened(path: Path, where: Callable[[], str] | None = None) -> Iterator[IO[bytes]]:
    """A file for reading, unpacked where its name ends in `.gz`.

    Args:
        path: the file.
        where: the place that has been reached, for messages about damage; the path when None.

    Raises:
        DataError: inside the block too, when the file is missing or its compression breaks off.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{where() if where else path}: the compressed file is damaged or truncated ({error}); "
            "download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines (from 1, without line ends) of a text file, `.gz` or plain.

    Raises:
        DataError: the file is missing, cannot be read, its compression breaks off, or a line is
            longer than `LONGEST_LINE`.
    """
    number = 0
    with opened(path, lambda: f"{path}:{number + 1}") as file:
        for number, line in bounded_lines(path, file):
            if stripped := line.strip():
                yield number, stripped


def bounded_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """All lines of an open file, numbered from 1, without a byte order mark at the start.

    Raises:
        DataError: a line is longer than `LONGEST_LINE`; no more than that of it is read.
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
