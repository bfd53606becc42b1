"""A checkpoint's files on this machine, whole and verified."""

from __future__ import annotations

import errno
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.artifacts import download_artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from mlflow_dr.beside import Beside
from mlflow_dr.encoder.whole import why_not_whole
from mlflow_dr.errors import MlflowDrError, UnavailableError, UsageError
from mlflow_dr.files import is_full, scratch, written_beside
from mlflow_dr.tracking import mlmodel
from mlflow_dr.tracking.checkpoints import PRUNED_TAG, Checkpoint
from mlflow_dr.tracking.manifest import MANIFEST, Manifest, read_manifest, verify_files

NO_PART_OF_IT = shutil.ignore_patterns(
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*", ".*")
)
FILES_AT_ONCE = 8


@contextmanager
def fetched(checkpoint: Checkpoint, whole: bool = False) -> Iterator[Path]:
    """The checkpoint's directory on this machine, verified; removed afterwards if it was copied.

    One that was found in a directory is copied, because its trainer may remove it meanwhile.

    Args:
        checkpoint: which.
        whole: also the files by which MLflow alone knows it, which no encoder needs.

    Raises:
        CheckpointError: it cannot be had, or its bytes are not those that were published.
        OSError: the disk is full.
    """
    if checkpoint.is_pruned:
        when = checkpoint.tags[PRUNED_TAG]
        raise UnavailableError(f"models:/{checkpoint.model_id}: its files were removed ({when})")
    with scratch() as room:
        try:
            directory = _had(checkpoint, room, whole)
        except MlflowDrError:
            raise
        except Exception as error:  # an object store's errors are of no common kind
            if is_full(error, room.parent):
                message = "the disk is full; TMPDIR names a directory on another one"
                raise OSError(errno.ENOSPC, message, str(room.parent)) from error
            reason = " ".join(str(error).split())[:300]
            raise UnavailableError(f"cannot be downloaded: {reason}") from error
        if checkpoint.manifest:
            verify_files(directory, _listed(directory, checkpoint, whole))
        elif checkpoint.directory and (reason := why_not_whole(directory)):
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
            f"the files of {checkpoint.uri} (step {checkpoint.step}) were removed; its figures are "
            "all that is left"
        )
    with fetched(checkpoint, whole=True) as files, written_beside(directory.absolute()) as partial:
        shutil.copytree(files, partial)


def _had(checkpoint: Checkpoint, room: Path, whole: bool) -> Path:
    if checkpoint.directory:
        return Path(shutil.copytree(checkpoint.directory, room, ignore=NO_PART_OF_IT))
    if here := _local(checkpoint.location):
        return here
    if not checkpoint.manifest:
        return Path(download_artifacts(artifact_uri=checkpoint.location, dst_path=str(room)))
    # by the manifest: to ask what there is takes a request for each directory
    room.mkdir()
    store = get_artifact_repository(checkpoint.location)
    store._download_file(MANIFEST, str(room / MANIFEST))
    names = list(_listed(room, checkpoint, whole))
    for parent in {(room / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    _for_each(names, lambda name: store._download_file(name, str(room / name)))
    return room


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

    workers = [Beside(work, "download") for _ in range(min(FILES_AT_ONCE, len(left)))]
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
    return {name: said for name, said in listed.items() if whole or name not in mlmodel.FILES}


def _local(location: str) -> Path | None:
    """The directory itself where artifacts lie on this machine's file system."""
    if urlsplit(location).scheme not in ("", "file"):
        return None
    return Path(local_file_uri_to_path(location))
