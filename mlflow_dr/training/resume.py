"""Going on with a training that was stopped: which run it was, and which checkpoints are whole.

Trainer writes a checkpoint file by file, so one that a crash has cut off looks like any other. Here
a list of its files with their sizes and SHA-256 is written last, when everything is on the disk. A
checkpoint whose files are others than the list says is passed over, or refused where it was named.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write, file_sha256

log = logging.getLogger(__name__)

LOCK_FILE = ".mlflow_dr.lock"
# no locks there, or what is resumed from may only be read
NO_LOCKS = frozenset(
    (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EROFS)
)
RUN_FILE = "mlflow_dr_run.json"
COMPLETE_FILE = "mlflow_dr_complete.json"
LAST = "true"


@dataclass(frozen=True)
class Resumption:
    """What a training goes on from.

    Attributes:
        run_id: the MLflow run.
        checkpoint: Trainer's checkpoint; None where the training was stopped before the first.
        damaged: what is wrong with later checkpoints, which were passed over.
    """

    run_id: str
    checkpoint: Path | None
    damaged: tuple[str, ...] = field(default=(), compare=False)


def find_resumption(output_dir: str | Path, asked: str | None) -> Resumption | None:
    """What to go on from.

    Args:
        output_dir: where the training saves.
        asked: `true` for the last whole checkpoint in `output_dir`, or a checkpoint's directory;
            None or `false` for a new training.

    Raises:
        UsageError: there is nothing to go on from, or it is damaged.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != LAST:
        return _named(Path(asked).expanduser())
    directory = Path(output_dir)
    run_id = _read(directory / RUN_FILE).get("run_id")
    if not isinstance(run_id, str) or not run_id:
        raise UsageError(
            f"{directory}: no training was started there ({RUN_FILE} is missing or damaged); give "
            "the --output_dir that it had, name a checkpoint, or leave --resume_from_checkpoint out"
        )
    damaged: list[str] = []
    for path in reversed(checkpoints(directory).values()):
        if not (path / COMPLETE_FILE).exists() or _run_of(path) not in (None, run_id):
            continue  # a crash has cut it off, or it is another run's
        if problem := incomplete_reason(path):
            damaged.append(f"{path}: {problem}")
        else:
            return Resumption(run_id, path, tuple(damaged))
    if damaged:
        raise UsageError(
            f"{damaged[0]}, and there is no whole checkpoint in {directory}; restore that file, or "
            "begin anew with --overwrite_output_dir and without --resume_from_checkpoint"
        )
    return Resumption(run_id, None)


def _named(checkpoint: Path) -> Resumption:
    problem, run_id = incomplete_reason(checkpoint), _run_of(checkpoint)
    if problem or run_id is None:
        raise UsageError(
            f"{checkpoint}: not a whole checkpoint of `mlflow-dr train` ({problem}); "
            "--resume_from_checkpoint without a value takes the last whole one in --output_dir"
        )
    return Resumption(run_id, checkpoint)


def output_directories(
    output_dir: str | Path, saves: bool, resumption: Resumption | None
) -> list[Path]:
    """The directories that no second training may write to meanwhile.

    Args:
        output_dir: of the training.
        saves: whether it saves checkpoints to resume from.
        resumption: what it goes on from.
    """
    own = Path(output_dir)
    if resumption is None:
        return [own] if saves else []
    begun = resumption.checkpoint.parent if resumption.checkpoint else own
    return [own, begun] if saves else [begun]


@contextmanager
def locked_output(*directories: str | Path) -> Iterator[None]:
    """Keep other trainings out of output directories; the lock dies with this process.

    Raises:
        UsageError: another training has one of them, or one cannot be written.
    """
    if not directories:
        yield
        return
    first, *rest = dict.fromkeys(Path(one).expanduser().absolute() for one in directories)
    with _lock(first), locked_output(*rest):
        yield


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    path = directory / LOCK_FILE
    lock = FileLock(path, blocking=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout as error:
        owner = path.read_text(encoding="utf-8", errors="replace")[:100]
        raise UsageError(
            f"{directory}: another training ({owner or 'unknown'}) is writing there; wait until it "
            "has ended, or give another --output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", errno.ENOSYS)
        if number not in NO_LOCKS:
            raise UsageError(f"{directory}: cannot be written to ({error})") from error
        log.warning("%s cannot be locked (%s): start no second training there", directory, error)
    try:
        yield
    finally:
        lock.release()


def check_output_dir(output_dir: str | Path, overwrite: bool) -> None:
    """Refuse an output directory that holds another training's checkpoints.

    Args:
        output_dir: where a new training will save.
        overwrite: whether such checkpoints are to be removed.

    Raises:
        UsageError: there are such checkpoints, and they are not to be removed.
    """
    directory = Path(output_dir)
    if not overwrite and (there := list(checkpoints(directory).values())):
        raise UsageError(
            f"{directory} has checkpoints of another training (such as {there[-1].name}); "
            "--resume_from_checkpoint goes on with it, --overwrite_output_dir removes them, "
            "or give another --output_dir"
        )


def begin_output(output_dir: str | Path, run_id: str) -> None:
    """Note in the output directory whose checkpoints it holds, and remove those of others."""
    directory = Path(output_dir)
    for checkpoint in checkpoints(directory).values():
        shutil.rmtree(checkpoint)
    _write(directory / RUN_FILE, {"run_id": run_id})


def mark_complete(checkpoint: Path, run_id: str) -> None:
    """Declare a checkpoint whole, once all its files are on the disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / COMPLETE_FILE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(checkpoint).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    _write(checkpoint / COMPLETE_FILE, {"run_id": run_id, "files": files})


def checkpoints(directory: Path) -> dict[int, Path]:
    """Trainer's checkpoints in a directory, whole or not, by step; ascending."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in directory.glob("*")]
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def complete_checkpoints_until(last: Path) -> dict[int, Path]:
    """Checkpoints beside one and of the same run that were saved whole; it is the last.

    Their files have the right sizes; `incomplete_reason` says whether they have the right bytes.

    Returns:
        step -> directory, ascending; nothing where `last` was given another name.
    """
    run_id = _run_of(last)
    found: dict[int, Path] = {}
    for step, path in checkpoints(last.parent).items():
        if _run_of(path) == run_id and not incomplete_reason(path, sizes_only=True):
            found[step] = path
        if path == last:
            return found
    return {}


def incomplete_reason(checkpoint: Path, sizes_only: bool = False) -> str:
    """What is wrong with the files of a checkpoint; empty where nothing is.

    Args:
        checkpoint: its directory.
        sizes_only: whether to leave the bytes of files unread.
    """
    files = _read(checkpoint / COMPLETE_FILE).get("files")
    if not isinstance(files, dict) or not files or _run_of(checkpoint) is None:
        return f"{COMPLETE_FILE} is missing or damaged"
    for name, known in files.items():
        path = checkpoint / name
        if not isinstance(known, dict) or "\0" in name:
            return f"{COMPLETE_FILE} is damaged, or of an earlier version"
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != known.get("bytes"):
            return f"{name} has {size} bytes, but {known.get('bytes')} were saved"
        if not sizes_only and file_sha256(path) != known.get("sha256"):
            return f"{name} has other bytes than were saved"
    return ""


def _run_of(checkpoint: Path) -> str | None:
    """The run that a checkpoint's list of files names; None without one."""
    run_id = _read(checkpoint / COMPLETE_FILE).get("run_id")
    return run_id if isinstance(run_id, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
