"""A checkpoint's manifest: size and SHA-256 of every file, so that a download can be verified."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow_dr.errors import CheckpointError
from mlflow_dr.files import file_sha256

MANIFEST = "manifest.json"

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


def read_manifest(directory: Path, digest: str) -> Manifest:
    """The files that a directory's manifest lists, the manifest compared with its digest.

    Raises:
        CheckpointError: it is missing, another one, or names a file outside the directory.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: the checkpoint was not published whole")
    if file_sha256(manifest) != digest:
        raise CheckpointError(f"{MANIFEST} is not the one that was published (SHA-256 differs)")
    files: Manifest = json.loads(manifest.read_text(encoding="utf-8"))
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{MANIFEST} names {name!r}, which is outside the checkpoint")
    return files


def verify_files(directory: Path, files: Manifest) -> None:
    """Compare files with what a manifest says of them.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were published.
    """
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing from the checkpoint")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{name} has {size} bytes, but {expected['bytes']} were published"
            )
        if file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{name} has other bytes than were published (SHA-256 differs)")
