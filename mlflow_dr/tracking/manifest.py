"""A checkpoint's manifest: size and SHA-256 of every file, so that a download can be verified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import FileInfo

from mlflow_dr.errors import CheckpointError, TrackingError
from mlflow_dr.files import file_sha256

MANIFEST = "manifest.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_PART = 255  # bytes of a file's or folder's name

Manifest = dict[str, dict[str, Any]]
"""file name -> `bytes`, `sha256`."""


def write_manifest(directory: Path) -> str:
    """List every file of a directory in `manifest.json`; returns the SHA-256 of that file."""
    files = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    target = directory / MANIFEST
    target.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    return file_sha256(target)


def verify_manifest(directory: Path, digest: str) -> None:
    """Compare a directory with its manifest, and the manifest with its digest.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were published.
    """
    verify_files(directory, read_manifest(directory, digest))


def read_manifest(directory: Path, digest: str | None) -> Manifest:
    """The files that a directory's manifest lists, the manifest compared with its digest.

    Args:
        directory: of the checkpoint.
        digest: SHA-256 of the manifest; it is not compared when None.

    Raises:
        CheckpointError: it is missing, another one, malformed, or names a file outside the
            directory.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: the checkpoint was not published whole")
    if digest is not None and file_sha256(manifest) != digest:
        raise CheckpointError(f"{MANIFEST} is not the one that was published (SHA-256 differs)")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not JSON ({str(error)[:100]})") from error
    return _checked(files)


def verify_files(directory: Path, files: Manifest) -> None:
    """Compare files with what a manifest says of them.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were published.
    """
    for name, expected in files.items():
        if reason := why_different(directory / name, name, expected):
            raise CheckpointError(reason)


def why_different(path: Path, name: str, expected: dict[str, Any]) -> str:
    """How a file differs from what a manifest says of it; empty where it does not."""
    if not path.is_file():
        return f"{MANIFEST} lists {name}, which is missing from the checkpoint"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, but {expected['bytes']} were published"
    if file_sha256(path) != expected["sha256"]:
        return f"{name} has other bytes than were published (SHA-256 differs)"
    return ""


def unlisted_files(directory: Path, files: Manifest) -> list[str]:
    """What a directory holds beside its manifest and the files that this lists, by name."""
    expected = {MANIFEST, *files}
    expected |= {str(parent) for name in files for parent in PurePosixPath(name).parents}
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*"))
    return sorted(name for name in found if name not in expected)


def link_listed_files(directory: Path, files: Iterable[str], view: Path) -> Path:
    """A new directory that holds the manifest and the files that it lists, as links.

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


def _checked(files: Any) -> Manifest:
    """What a manifest holds, once it is known to be one.

    Raises:
        CheckpointError: with the first thing that is malformed.
    """
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST} lists no files: {files!r:.80}")
    for name, said in files.items():
        if reason := _why_no_name(name):
            raise CheckpointError(f"{MANIFEST} names {name!r:.200}, which is {reason}")
        for parent in PurePosixPath(name).parents:
            if str(parent) in files:
                raise CheckpointError(f"{MANIFEST} names {name!r} and {str(parent)!r}, its folder")
        if not isinstance(said, dict):
            raise CheckpointError(f"{MANIFEST}, {name!r}: expected bytes and sha256: {said!r:.80}")
        size, digest = said.get("bytes"), said.get("sha256")
        if type(size) is not int or size < 0:
            raise CheckpointError(f"{MANIFEST}, {name!r}: not a number of bytes: {size!r:.80}")
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise CheckpointError(f"{MANIFEST}, {name!r}: not a SHA-256: {digest!r:.80}")
    return files


def _why_no_name(name: str) -> str:
    """Why this cannot be the name of a file of a checkpoint; empty where it can."""
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts:
        return "outside the checkpoint"
    try:
        longest = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        return "not text"
    if "\0" in name or not 0 < longest <= LONGEST_PART or name != "/".join(parts):
        return "not the name of a file"
    return "the manifest itself" if name == MANIFEST else ""


def verify_upload(directory: Path, listed: Callable[[str | None], Iterable[FileInfo]]) -> None:
    """Compare what an artifact store lists with the directory that was uploaded.

    A login page in place of the store's answer to an upload has status 200, too.

    Args:
        directory: what was uploaded.
        listed: gives what the store has in a folder; None is the top.

    Raises:
        TrackingError: a file is missing there, or has another size.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    sizes: dict[str, int | None] = {}
    for folder in {path.relative_to(directory).parent.as_posix() for path in files}:
        found = listed(None if folder == "." else folder)
        sizes.update({one.path: one.file_size for one in found if not one.is_dir})
    for path in files:
        name, size = path.relative_to(directory).as_posix(), path.stat().st_size
        if name not in sizes:
            raise TrackingError(f"the artifact store does not list {name} after its upload")
        if sizes[name] not in (None, size):
            raise TrackingError(
                f"the artifact store has {sizes[name]} bytes of {name} after its upload of {size}"
            )
