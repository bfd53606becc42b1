"""Files that are whole or not there: everything is written beside its place and renamed into it."""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mlflow_dr.errors import DataError

CACHE_VARIABLE = "MLFLOW_DR_CACHE"
SCRATCH = "mlflow_dr-scratch-"
LOCK = ".lock"
ALMOST_NOTHING = 1 << 20


def cache_dir() -> Path:
    """The user's cache directory: `$MLFLOW_DR_CACHE`, else `$XDG_CACHE_HOME/mlflow_dr`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlflow_dr"


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def digest_of(*parts: object) -> str:
    """A short hexadecimal digest (16 characters of SHA-256) of the parts' text."""
    return hashlib.sha256("\x00".join(str(part) for part in parts).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make `target` (a file or directory) with `build`, once, whatever number of processes ask.

    `build` gets a path beside the target and writes there; the result is renamed into place when
    `build` returns and removed when it raises, so that the target is whole or absent. What a killed
    process left of its try is removed by the next one.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
            shutil.rmtree(left, ignore_errors=True)
        if not target.exists():
            with written_beside(target) as partial:
                build(partial)
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
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or shutil.disk_usage(directory).free < ALMOST_NOTHING


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines (from 1, without line ends) of a text file, `.gz` or plain.

    Raises:
        DataError: the file is missing, cannot be read, or its compression breaks off.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if stripped := line.strip():
                    yield number, stripped
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the compressed file is damaged or truncated ({error}); "
            "download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def decoded(line: bytes, path: Path, number: int) -> str:
    """The line as text; a DataError with file:line when it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
