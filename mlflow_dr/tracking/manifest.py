"""A checkpoint's manifest: size and SHA-256 of every file, so that a download can be verified."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec
from mlflow.entities import FileInfo

from mlflow_dr.errors import CheckpointError, TrackingError
from mlflow_dr.files import file_sha256, sizes_and_digests

MANIFEST = "manifest.json"
LONGEST_PART = 255  # bytes of the name of a file or folder


class FileEntry(msgspec.Struct, frozen=True):
    """What a manifest says of a file."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


Manifest = dict[str, FileEntry]
"""File name, relative to the checkpoint -> size and SHA-256."""


def write_manifest(directory: Path) -> str:
    """List every file of a directory in `manifest.json`; returns the SHA-256 of that file."""
    files = sizes_and_digests(directory, MANIFEST)
    target = directory / MANIFEST
    target.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    return file_sha256(target)


def read_manifest(directory: Path, digest: str | None) -> Manifest:
    """The files that a directory's manifest lists.

    Args:
        directory: of the checkpoint.
        digest: SHA-256 that the manifest must have; it is not compared when None.

    Raises:
        CheckpointError: the manifest is missing, changed or malformed, or it names a file outside
            the directory.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: the checkpoint was not published completely")
    if digest is not None and file_sha256(path) != digest:
        raise CheckpointError(f"{MANIFEST} is not the one that was published (SHA-256 differs)")
    try:
        files = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is malformed ({str(error)[:200]})") from error
    if not files:
        raise CheckpointError(f"{MANIFEST} lists no files")
    for name in files:
        if reason := _name_defect(name):
            raise CheckpointError(f"{MANIFEST} names {name!r:.200}, which is {reason}")
        for parent in PurePosixPath(name).parents:
            if str(parent) in files:
                raise CheckpointError(f"{MANIFEST} names {name!r} and {str(parent)!r}, its folder")
    return files


def verify_files(directory: Path, files: Manifest) -> None:
    """Compare files with what a manifest says of them.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were published.
    """
    for name, expected in files.items():
        if reason := why_different(directory / name, name, expected):
            raise CheckpointError(reason)


def why_different(path: Path, name: str, expected: FileEntry) -> str:
    """How a file differs from what a manifest says of it; empty if it does not."""
    if not path.is_file():
        return f"{MANIFEST} lists {name}, which is missing from the checkpoint"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{name} has {size} bytes, but {expected.bytes} were published"
    if file_sha256(path) != expected.sha256:
        return f"{name} has other bytes than were published (SHA-256 differs)"
    return ""


def unlisted_files(directory: Path, files: Manifest) -> list[str]:
    """Files and folders of a directory that its manifest does not list, by name."""
    expected = {MANIFEST, *files}
    expected |= {str(parent) for name in files for parent in PurePosixPath(name).parents}
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*"))
    return sorted(name for name in names if name not in expected)


def link_listed_files(directory: Path, files: Iterable[str], view: Path) -> Path:
    """Make a directory of links to the manifest and to the files that it lists.

    Args:
        directory: the files.
        files: names that its manifest lists.
        view: the new directory.
    """
    for name in (MANIFEST, *files):
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((directory / name).absolute())
    return view


def verify_upload(directory: Path, listed: Callable[[str | None], Iterable[FileInfo]]) -> None:
    """Compare what an artifact store lists with the directory that was uploaded.

    This is needed because a login page in answer to an upload also has status 200.

    Args:
        directory: what was uploaded.
        listed: lists a folder of the store; None is the top.

    Raises:
        TrackingError: a file is missing in the store, or has another size.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    sizes: dict[str, int | None] = {}
    for folder in {path.relative_to(directory).parent.as_posix() for path in files}:
        entries = listed(None if folder == "." else folder)
        sizes.update({entry.path: entry.file_size for entry in entries if not entry.is_dir})
    for path in files:
        name, size = path.relative_to(directory).as_posix(), path.stat().st_size
        if name not in sizes:
            raise TrackingError(f"the artifact store does not list {name} after its upload")
        if sizes[name] not in (None, size):
            raise TrackingError(
                f"the artifact store has {sizes[name]} bytes of {name} after its upload of {size}"
            )


def _name_defect(name: str) -> str:
    """Why a name cannot belong to a file of a checkpoint; empty if it can."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "outside the checkpoint"
    longest = max((len(part.encode()) for part in path.parts), default=0)
    if "\0" in name or not 0 < longest <= LONGEST_PART or name != "/".join(path.parts):
        return "not the name of a file"
    return "the manifest itself" if name == MANIFEST else ""
