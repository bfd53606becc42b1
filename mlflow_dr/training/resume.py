"""Resuming a training: its run, its flags, and which of its checkpoints are complete.

Trainer writes a checkpoint file by file, so one that a crash interrupted looks like any other. Here
a list of its files with their sizes and SHA-256 is written last, when everything is on the disk. A
checkpoint with other files is not used; if the user named it, it is refused.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write, file_sha256, sizes_and_digests
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.run_params import NEVER_LOGGED, all_flags, default_flags, params_of

log = logging.getLogger(__name__)

LOCK_FILE = ".mlflow_dr.lock"
# the file system has no locks, or is read-only
NO_LOCKS = frozenset(
    (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EROFS)
)
RUN_FILE = "mlflow_dr_run.json"
COMPLETE_FILE = "mlflow_dr_complete.json"
LAST = "true"

RESUMED_TAG = "mlflow_dr.resumed"
LONGEST_TAG = 5000
# flags (or their beginnings) that a resumed training may change without training differently
MAY_CHANGE = (
    *("resume_from_checkpoint", "overwrite_output_dir", "model", "publish_", "save_", "logging_"),
    *("log_", "eval_", "do_", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("dataloader_p", "dataset_proc_num", "cache_dir", "token_table", "document_store"),
    *("disable_tqdm", "report_to", "engine"),
    *("torch_compile", "gc_", "grad_cache", "use_cpu", "local_rank", "ddp_", "skip_memory_metrics"),
    *("tracking_uri", "experiment_name", "validation_", "include_", "average_tokens", "run_name"),
)


@dataclass(frozen=True)
class Resumption:
    """What a training resumes from.

    Attributes:
        run_id: the MLflow run.
        checkpoint: Trainer's checkpoint; None if the training was stopped before the first one.
        damaged: what is wrong with later checkpoints, which are not used.
    """

    run_id: str
    checkpoint: Path | None
    damaged: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """The checkpoint's name, as messages show it."""
        return self.checkpoint.name if self.checkpoint else "the start"


def find_resumption(output_dir: str | Path, asked: str | None) -> Resumption | None:
    """What to resume from; None for a new training.

    Args:
        output_dir: the directory of the training's checkpoints.
        asked: `true` for the last complete checkpoint in `output_dir`, or the directory of a
            checkpoint; None or `false` for a new training.

    Raises:
        UsageError: there is nothing to resume from, or it is damaged.
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
            "the --output_dir of the training, name a checkpoint, or leave out "
            "--resume_from_checkpoint"
        )
    damaged: list[str] = []
    for path in reversed(checkpoints(directory).values()):
        if not (path / COMPLETE_FILE).exists() or _run_id(path) not in (None, run_id):
            continue  # a crash interrupted it, or it belongs to another run
        if reason := incomplete_reason(path):
            damaged.append(f"{path}: {reason}")
        else:
            return Resumption(run_id, path, tuple(damaged))
    if damaged:
        raise UsageError(
            f"{damaged[0]}, and {directory} has no complete checkpoint; restore that file, or "
            "start a new training with --overwrite_output_dir and without --resume_from_checkpoint"
        )
    return Resumption(run_id, None)


def _named(checkpoint: Path) -> Resumption:
    reason, run_id = incomplete_reason(checkpoint), _run_id(checkpoint)
    if reason or run_id is None:
        raise UsageError(
            f"{checkpoint}: not a complete checkpoint of `mlflow-dr train` ({reason}); use "
            "--resume_from_checkpoint without a value to resume from the last complete checkpoint "
            "in --output_dir"
        )
    return Resumption(run_id, checkpoint)


@contextmanager
def claimed_output(
    output_dir: str | Path, resumption: Resumption | None, saves: bool, overwrite: bool = False
) -> Iterator[None]:
    """Lock the directories that a training uses; the locks end with this process.

    Args:
        output_dir: the directory of the training's checkpoints.
        resumption: what it resumes from.
        saves: whether the training saves checkpoints.
        overwrite: whether checkpoints of another training may be there.

    Raises:
        UsageError: another training has locked a directory or has checkpoints there, or it cannot
            be written to.
    """
    own = Path(output_dir)
    directories = [own] if saves else []
    if resumption is not None:
        directories.append(resumption.checkpoint.parent if resumption.checkpoint else own)
    with ExitStack() as locks:
        for directory in dict.fromkeys(path.expanduser().absolute() for path in directories):
            locks.enter_context(_lock(directory))
        others = list(checkpoints(own).values()) if saves and resumption is None else []
        if others and not overwrite:
            raise UsageError(
                f"{own} has checkpoints of another training (such as {others[-1].name}); resume it "
                "by --resume_from_checkpoint, remove them by --overwrite_output_dir, or give "
                "another --output_dir"
            )
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
            "ends, or give another --output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", errno.ENOSYS)
        if number not in NO_LOCKS:
            raise UsageError(f"{directory}: cannot be written to ({error})") from error
        log.warning(
            "%s cannot be locked (%s); do not start a second training there", directory, error
        )
    try:
        yield
    finally:
        lock.release()


def begin_output(output_dir: str | Path, run_id: str) -> None:
    """Note the run in the output directory, and remove checkpoints of other trainings."""
    directory = Path(output_dir)
    for checkpoint in checkpoints(directory).values():
        shutil.rmtree(checkpoint)
    _write(directory / RUN_FILE, {"run_id": run_id})


def mark_complete(checkpoint: Path, run_id: str) -> None:
    """Mark a checkpoint as complete, when all its files are on the disk."""
    files = sizes_and_digests(checkpoint, COMPLETE_FILE)
    for name in files:
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
    _write(checkpoint / COMPLETE_FILE, {"run_id": run_id, "files": files})


def checkpoints(directory: Path) -> dict[int, Path]:
    """Trainer's checkpoints in a directory, complete or not: step -> path, ascending."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in directory.glob("*")]
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def complete_checkpoints_until(last: Path) -> dict[int, Path]:
    """The complete checkpoints of the same run and directory, up to this one.

    Only the sizes of their files are compared; `incomplete_reason` also compares the bytes.

    Returns:
        step -> path, ascending; empty if `last` was renamed.
    """
    run_id = _run_id(last)
    complete: dict[int, Path] = {}
    for step, path in checkpoints(last.parent).items():
        if _run_id(path) == run_id and not incomplete_reason(path, sizes_only=True):
            complete[step] = path
        if path == last:
            return complete
    return {}


def incomplete_reason(checkpoint: Path, sizes_only: bool = False) -> str:
    """Why a checkpoint is not complete; empty if it is.

    Args:
        checkpoint: its directory.
        sizes_only: whether to compare sizes only, and not the bytes of files.
    """
    files = _read(checkpoint / COMPLETE_FILE).get("files")
    if not isinstance(files, dict) or not files or _run_id(checkpoint) is None:
        return f"{COMPLETE_FILE} is missing or damaged"
    for name, saved in files.items():
        path = checkpoint / name
        if not isinstance(saved, dict) or "\0" in name:
            return f"{COMPLETE_FILE} is damaged"
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != saved.get("bytes"):
            return f"{name} has {size} bytes, but {saved.get('bytes')} were saved"
        if not sizes_only and file_sha256(path) != saved.get("sha256"):
            return f"{name} has other bytes than were saved"
    return ""


def _run_id(checkpoint: Path) -> str | None:
    """The run of a checkpoint, as its list of files says; None without a list."""
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


def note_changes(run: TrackedRun, request: TrainingRequest, checkpoint: str) -> None:
    """Log the flags that a resumed training changes, and note them on the run.

    MLflow's params are written once and keep the first values; the tag `mlflow_dr.resumed` has the
    changes, by the checkpoint that they hold from.

    Args:
        run: the run, with the params of its beginning.
        request: the resumed training.
        checkpoint: the checkpoint's name.

    Raises:
        TrackingError: the server does not answer.
    """
    data = run.fetch().data
    noted = _noted(data.tags.get(RESUMED_TAG, ""))
    before: dict[str, str] = dict(data.params)
    for values in noted.values():
        before.update(values)
    changed = changes(before, request)
    if not changed:
        return
    text = ", ".join(f"{name} {now} (was {was})" for name, (was, now) in changed.items())
    log.warning(
        "resuming with changed flags: %s; they hold from %s on, also for the learning rate and the "
        "order of examples; the run's params keep the first values, its tag %s has the changes",
        *(text, checkpoint, RESUMED_TAG),
    )
    values = {name: now for name, (_, now) in changed.items()}
    noted[checkpoint] = {**noted.get(checkpoint, {}), **values}
    run.set_tags({RESUMED_TAG: json.dumps(noted)[:LONGEST_TAG]})


def changes(before: Mapping[str, str], request: TrainingRequest) -> dict[str, tuple[str, str]]:
    """Flags that change the training: name -> (value before, value now).

    Args:
        before: the params of a run; a missing one had its default.
        request: the resumed training.
    """
    now = {**request.trainer.to_dict(), **all_flags(request)}
    names = [
        name
        for name in {**before, **params_of(request)}
        if name in now and not name.startswith(MAY_CHANGE) and name not in NEVER_LOGGED
    ]
    defaults = default_flags()
    pairs = {name: (str(before.get(name, defaults.get(name))), str(now[name])) for name in names}
    return {name: pair for name, pair in sorted(pairs.items()) if not _is_same(*pair)}


def _noted(text: str) -> dict[str, dict[str, str]]:
    """The contents of the tag; empty if they are malformed."""
    try:
        values = json.loads(text or "{}")
        return {
            str(checkpoint): {str(name): str(value) for name, value in flags.items()}
            for checkpoint, flags in values.items()
        }
    except (ValueError, AttributeError):
        return {}


def _is_same(before: str, now: str) -> bool:
    """Whether two spellings, such as `2e-3` and `0.002`, mean the same value."""
    try:
        return float(before) == float(now)
    except ValueError:
        return before.lower() == now.lower()
