"""A checkpoint's files on this machine, whole and verified."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.artifacts import download_artifacts
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

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
    Manifest,
    link_listed_files,
    read_manifest,
    unlisted_files,
    verify_files,
    why_different,
)

log = logging.getLogger(__name__)

NO_PART_OF_IT = shutil.ignore_patterns(
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*", ".*")
)
FILES_AT_ONCE = 8
TRIES = 4  # of each file
SECONDS_BETWEEN_TRIES = 0.05  # after the first; twice as long after each of the others
NAMES_SHOWN = 3
NOT_THERE = -1


@contextmanager
def checkpoint_files(checkpoint: Checkpoint, whole: bool = False) -> Iterator[Path]:
    """The checkpoint's directory on this machine, verified; removed afterwards if it was made.

    It holds the files that its manifest lists, and no others. One that was found in a directory is
    copied, because its trainer may remove it meanwhile.

    Args:
        checkpoint: which.
        whole: also the files by which MLflow alone knows it, which no encoder needs.

    Raises:
        LostError: its files are gone.
        UnavailableError: it cannot be had here, for now or (`lasting`) at all.
        CheckpointError: its bytes are not those that were published: several fetches have shown the
            same ones.
        OSError: the disk is full.
    """
    if checkpoint.is_pruned:
        when = checkpoint.tags[PRUNED_TAG]
        raise LostError(f"{checkpoint.uri}: its files were deleted ({when})")
    with scratch() as room:
        try:
            directory = _fetch(checkpoint, room, whole)
        except MlflowDrError:
            raise
        except Exception as error:  # an object store's errors are of no common kind
            if is_full(error, room.parent):
                message = "the disk is full; TMPDIR names a directory on another one"
                raise OSError(errno.ENOSPC, message, str(room.parent)) from error
            lasting = any(
                isinstance(one, ImportError) or is_unknown_store(one) for one in causes(error)
            )
            raise UnavailableError(f"cannot be downloaded: {_words(error)}", lasting) from error
        if checkpoint.directory and (reason := encoder_defect(directory)):
            raise UnavailableError(f"{checkpoint.directory}: {reason}")
        yield directory


def download(checkpoint: Checkpoint, directory: Path) -> None:
    """Put a checkpoint's files, verified, into a directory that does not exist or is empty.

    Raises:
        UsageError: there is something in the directory, or it is a file.
        CheckpointError: the files were removed, cannot be had, or are not those published.
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
        checkpoint_files(checkpoint, whole=True) as files,
        atomic_write(directory.absolute()) as partial,
    ):
        shutil.copytree(files, partial)


def _fetch(checkpoint: Checkpoint, room: Path, whole: bool) -> Path:
    if checkpoint.directory:
        return Path(shutil.copytree(checkpoint.directory, room, ignore=NO_PART_OF_IT))
    if here := local_directory(checkpoint.location):
        return _in_place(checkpoint, here, room, whole)
    if not checkpoint.manifest:
        return Path(download_artifacts(artifact_uri=checkpoint.location, dst_path=str(room)))
    # by the manifest: to ask what there is takes a request for each directory
    room.mkdir()
    store = get_artifact_repository(checkpoint.location)
    _download(store, MANIFEST, room, {"sha256": checkpoint.manifest})
    listed = _listed(room, checkpoint, whole)
    for parent in {(room / name).parent for name in listed}:
        parent.mkdir(parents=True, exist_ok=True)
    _for_each(listed, lambda name: _download(store, name, room, listed[name]))
    return room


def _in_place(checkpoint: Checkpoint, here: Path, room: Path, whole: bool) -> Path:
    """The directory where a checkpoint lies, or links to what its manifest lists of it."""
    if not here.is_dir():
        # where the folder of all models is there, too, this one has gone; else nothing is known
        kind = LostError if here.parents[1].is_dir() else UnavailableError
        raise kind(f"cannot be read: there is no directory {here} on this machine")
    if not checkpoint.manifest:
        return here
    verify_files(here, _listed(here, checkpoint, whole))
    everything = read_manifest(here, checkpoint.manifest)
    more = unlisted_files(here, everything)
    if not more:
        return here
    files = [name for name in more if not (here / name).is_dir()]
    if files:  # Normalize of sentence-transformers has a folder, which is empty
        shown = ", ".join(files[:NAMES_SHOWN]) + (", ..." if len(files) > NAMES_SHOWN else "")
        log.warning(
            "step %d: %d files in %s are not in its manifest and are not used: %s",
            *(checkpoint.step, len(files), here, shown),
        )
    return link_listed_files(here, everything, room)


def _download(store: ArtifactRepository, name: str, room: Path, expected: dict[str, Any]) -> None:
    """Fetch a file, again where it does not come as it was published.

    Args:
        store: where the checkpoint lies.
        name: of the file.
        room: where it goes.
        expected: its `sha256` and, where that is known, its `bytes`.

    Raises:
        CheckpointError: each time the same other bytes came, as many as the store says it has.
        LostError: the store does not list it.
        UnavailableError: it came in another way each time.
        Exception: as the store has raised.
    """
    path = room / name
    came: set[str] = set()
    for number in range(TRIES):
        if number:
            time.sleep(SECONDS_BETWEEN_TRIES * 2 ** (number - 1))
        failed: Exception | None = None
        try:
            store._download_file(name, str(path))
        except Exception as error:
            if isinstance(error, ImportError) or is_full(error, room):
                raise
            failed = error
            came.add("")
            continue
        digest = file_sha256(path)
        if digest == expected["sha256"]:
            return
        came.add(digest)
    size = _size_in_store(store, name)
    if len(came) == 1 and failed is None and size in (None, path.stat().st_size):
        if "bytes" not in expected:
            raise CheckpointError(f"{name} is not the one that was published (SHA-256 differs)")
        raise CheckpointError(why_different(path, name, expected))
    if came == {""} and failed is not None and size == NOT_THERE:
        raise LostError(f"cannot be downloaded: {name}: {_words(failed)}") from failed
    if failed is not None:
        raise failed
    raise UnavailableError(f"cannot be downloaded: {name} did not come as it was published")


def _size_in_store(store: ArtifactRepository, name: str) -> int | None:
    """Bytes of a file as the store lists it; NOT_THERE where it lists others, None if unknown."""
    folder = name.rpartition("/")[0]
    try:
        listed = {one.path: one for one in store.list_artifacts(folder or None)}
    except Exception:  # noqa: BLE001 - an object store's errors are of no common kind
        return None
    found = listed.get(name)
    return NOT_THERE if found is None else found.file_size


def _for_each(names: Iterable[str], act: Callable[[str], object]) -> None:
    """Do it for several at once; whoever interrupts this need not wait for those under way."""
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
        for one in workers:
            try:
                one.wait()
            except Exception as error:  # noqa: BLE001 - raised when all have ended
                errors.append(error)
    finally:
        left.clear()
    if errors:
        raise errors[0]


def _listed(directory: Path, checkpoint: Checkpoint, whole: bool) -> Manifest:
    """What the manifest says of the files that are wanted."""
    listed = read_manifest(directory, checkpoint.manifest)
    return {
        name: said for name, said in listed.items() if whole or not mlmodel.is_description(name)
    }


def local_directory(location: str) -> Path | None:
    """The directory itself where artifacts lie on this machine's file system."""
    if urlsplit(location).scheme not in ("", "file"):
        return None
    return Path(local_file_uri_to_path(location))


def _words(error: Exception) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
