"""A checkpoint's files on this machine, complete and verified."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.artifacts import download_artifacts
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from mlflow_dr import compat
from mlflow_dr.background import BackgroundTask
from mlflow_dr.encoder.files import encoder_defect
from mlflow_dr.errors import (
    CheckpointError,
    LostError,
    MlflowDrError,
    UnavailableError,
    UsageError,
    causes,
)
from mlflow_dr.files import atomic_write, file_sha256, is_full, scratch
from mlflow_dr.tracking import mlmodel
from mlflow_dr.tracking.checkpoints import PRUNED_TAG, Checkpoint
from mlflow_dr.tracking.client import is_unknown_store
from mlflow_dr.tracking.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    link_listed_files,
    read_manifest,
    unlisted_files,
    verify_files,
    why_different,
)

log = logging.getLogger(__name__)

NOT_THE_ENCODER = shutil.ignore_patterns(
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*", ".*")
)
FILES_AT_ONCE = 8
TRIES = 4  # of each file
SECONDS_BETWEEN_TRIES = 0.05  # after the first try; twice as long after each further one
NAMES_SHOWN = 3
NOT_THERE = -1


@contextmanager
def checkpoint_files(checkpoint: Checkpoint, with_mlmodel: bool = False) -> Iterator[Path]:
    """A local directory with the checkpoint's verified files; a copy is deleted afterwards.

    It holds exactly the files that the manifest lists. A checkpoint that was found in a directory
    is copied, because its trainer may delete it meanwhile.

    Args:
        checkpoint: published or found.
        with_mlmodel: include the files that only MLflow needs.

    Raises:
        LostError: its files are gone.
        UnavailableError: it cannot be fetched here, for now or (`lasting`) at all.
        CheckpointError: several downloads have shown the same bytes, which were not published.
        OSError: the disk is full.
    """
    if checkpoint.is_pruned:
        when = checkpoint.tags[PRUNED_TAG]
        raise LostError(f"{checkpoint.uri}: its files were deleted ({when})")
    with scratch() as target:
        try:
            directory = _fetch(checkpoint, target, with_mlmodel)
        except MlflowDrError:
            raise
        except Exception as error:  # object stores raise errors of many kinds
            if is_full(error, target.parent):
                message = "the disk is full; TMPDIR names a directory on another one"
                raise OSError(errno.ENOSPC, message, str(target.parent)) from error
            lasting = any(
                isinstance(cause, ImportError) or is_unknown_store(cause) for cause in causes(error)
            )
            raise UnavailableError(f"cannot be downloaded: {_message(error)}", lasting) from error
        if checkpoint.directory and (reason := encoder_defect(directory)):
            raise UnavailableError(f"{checkpoint.directory}: {reason}")
        yield directory


def download(checkpoint: Checkpoint, directory: Path) -> None:
    """Put a checkpoint's files, verified, into a directory that does not exist or is empty.

    Raises:
        UsageError: there is something in the directory, or it is a file.
        CheckpointError: the files were deleted, cannot be fetched, or are not those published.
        OSError: the disk is full.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: expected a directory that is new or empty")
    if checkpoint.is_pruned:
        raise UnavailableError(
            f"the files of {checkpoint.uri} (step {checkpoint.step}) were deleted; only metrics "
            "are left"
        )
    with (
        checkpoint_files(checkpoint, with_mlmodel=True) as files,
        atomic_write(directory.absolute()) as partial,
    ):
        shutil.copytree(files, partial)


def _fetch(checkpoint: Checkpoint, target: Path, with_mlmodel: bool) -> Path:
    if checkpoint.directory:
        return Path(shutil.copytree(checkpoint.directory, target, ignore=NOT_THE_ENCODER))
    if here := local_directory(checkpoint.location):
        return _in_place(checkpoint, here, target, with_mlmodel)
    if not checkpoint.manifest:
        return Path(download_artifacts(artifact_uri=checkpoint.location, dst_path=str(target)))
    # the manifest names the files; listing them would take a request for each folder
    target.mkdir()
    store = get_artifact_repository(checkpoint.location)
    _download(store, MANIFEST, target, checkpoint.manifest)
    listed = _listed(target, checkpoint, with_mlmodel)
    for parent in {(target / name).parent for name in listed}:
        parent.mkdir(parents=True, exist_ok=True)
    _for_each(
        listed, lambda name: _download(store, name, target, listed[name].sha256, listed[name].bytes)
    )
    return target


def _in_place(checkpoint: Checkpoint, here: Path, target: Path, with_mlmodel: bool) -> Path:
    """The directory where a checkpoint lies, or links to the files that its manifest lists."""
    if not here.is_dir():
        # if the folder of all models exists, this checkpoint was deleted; otherwise that is unknown
        kind = LostError if here.parents[1].is_dir() else UnavailableError
        raise kind(f"cannot be read: there is no directory {here} on this machine")
    if not checkpoint.manifest:
        return here
    verify_files(here, _listed(here, checkpoint, with_mlmodel))
    everything = read_manifest(here, checkpoint.manifest)
    unlisted = unlisted_files(here, everything)
    if not unlisted:
        return here
    files = [name for name in unlisted if not (here / name).is_dir()]
    if files:  # sentence-transformers writes an empty folder for Normalize
        shown = ", ".join(files[:NAMES_SHOWN]) + (", ..." if len(files) > NAMES_SHOWN else "")
        log.warning(
            "step %d: %d files in %s are not in its manifest and are not used: %s",
            *(checkpoint.step, len(files), here, shown),
        )
    return link_listed_files(here, everything, target)


def _download(
    store: ArtifactRepository, name: str, target: Path, sha256: str, size: int | None = None
) -> None:
    """Download a file, again if its bytes are not those that were published.

    Args:
        store: of the checkpoint.
        name: of the file.
        target: the directory that it is written to.
        sha256: of its bytes.
        size: in bytes, if it is known.

    Raises:
        CheckpointError: each download gave the same wrong bytes, as many as the store lists.
        LostError: the store does not list the file.
        UnavailableError: each download gave other bytes.
        Exception: as the store raised it.
    """
    path = target / name
    digests: set[str] = set()
    for number in range(TRIES):
        if number:
            time.sleep(SECONDS_BETWEEN_TRIES * 2 ** (number - 1))
        failed: Exception | None = None
        try:
            compat.download_file(store, name, str(path))
        except Exception as error:
            if isinstance(error, ImportError) or is_full(error, target):
                raise
            failed = error
            digests.add("")
            continue
        digest = file_sha256(path)
        if digest == sha256:
            return
        digests.add(digest)
    stored_size = _size_in_store(store, name)
    if len(digests) == 1 and failed is None and stored_size in (None, path.stat().st_size):
        if size is None:
            raise CheckpointError(f"{name} is not the one that was published (SHA-256 differs)")
        raise CheckpointError(why_different(path, name, FileEntry(size, sha256)))
    if digests == {""} and failed is not None and stored_size == NOT_THERE:
        raise LostError(f"cannot be downloaded: {name}: {_message(failed)}") from failed
    if failed is not None:
        raise failed
    raise UnavailableError(f"cannot be downloaded: {name} has other bytes at each download")


def _size_in_store(store: ArtifactRepository, name: str) -> int | None:
    """The size of a file in the store; NOT_THERE if it is not listed, None if it is unknown."""
    folder = name.rpartition("/")[0]
    try:
        listed = {entry.path: entry for entry in store.list_artifacts(folder or None)}
    except Exception:  # noqa: BLE001 - object stores raise errors of many kinds
        return None
    entry = listed.get(name)
    return NOT_THERE if entry is None else entry.file_size


def _for_each(names: Iterable[str], act: Callable[[str], object]) -> None:
    """Call `act` for several names at a time. An interrupt does not wait for calls under way."""
    left = deque(names)

    def work() -> None:
        while True:
            try:
                name = left.popleft()
            except IndexError:
                return
            try:
                act(name)
            except Exception:
                left.clear()
                raise

    workers = [BackgroundTask(work, "download") for _ in range(min(FILES_AT_ONCE, len(left)))]
    errors: list[Exception] = []
    try:
        for worker in workers:
            try:
                worker.wait()
            except Exception as error:  # noqa: BLE001 - raised when all have ended
                errors.append(error)
    finally:
        left.clear()
    if errors:
        raise errors[0]


def _listed(directory: Path, checkpoint: Checkpoint, with_mlmodel: bool) -> Manifest:
    """The manifest's entries for the wanted files."""
    entries = read_manifest(directory, checkpoint.manifest)
    return {
        name: entry
        for name, entry in entries.items()
        if with_mlmodel or not mlmodel.is_description(name)
    }


def local_directory(location: str) -> Path | None:
    """The directory of artifacts that lie on this machine's file system; else None."""
    if urlsplit(location).scheme not in ("", "file"):
        return None
    return Path(local_file_uri_to_path(location))


def _message(error: Exception) -> str:
    """An error's message on one line, or its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
