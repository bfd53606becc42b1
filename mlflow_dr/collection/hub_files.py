"""Files of a data set repository on the Hugging Face hub, in its cache on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.recordfiles import check_complete, state_of
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of

READERS = {".parquet": "parquet", ".jsonl.gz": "json", ".jsonl": "json"}


class HubFiles(NamedTuple):
    """Data files of one format, of one repository at one commit, on this machine."""

    repo: str
    commit: str
    suffix: str
    files: list[Path]

    @property
    def where(self) -> str:
        """The repository and its first file, for messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"Hugging Face {self.repo} ({self.files[0].name}{more})"

    @property
    def digest(self) -> str:
        """Names the commit, and what its files hold on this machine now; a cache's key."""
        return digest_of("hub", self.repo, self.commit, *map(state_of, self.files))

    @property
    def way_out(self) -> str:
        """What to do about a damaged file."""
        return (
            "if a file is damaged, "
            f"`hf download --force-download --repo-type dataset {self.repo}` replaces it"
        )


def fetched(repo: str, stem: str) -> HubFiles:
    """The files `<stem>.*` or `<stem>-*.*` of a repository, downloaded where the cache lacks them.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or the repository does.
    """
    found, folder = _found(repo, [stem])
    if stem not in found:
        raise DataError(
            f"Hugging Face {repo}: no {stem}.jsonl.gz, .jsonl or .parquet in {folder}; expected "
            f"Tevatron's layout; `hf download --repo-type dataset {repo}` completes the folder"
        )
    return found[stem]


def fetched_where_there(repo: str, stems: Sequence[str]) -> dict[str, HubFiles]:
    """The files of those stems that the repository has.

    Raises:
        DataError: the hub cannot be reached and the cache has nothing of the repository.
    """
    return _found(repo, stems)[0]


def _found(repo: str, stems: Sequence[str]) -> tuple[dict[str, HubFiles], Path]:
    folder = _snapshot(repo, [p for stem in stems for s in READERS for p in _patterns(stem, s)])
    found: dict[str, HubFiles] = {}
    for stem in stems:
        for suffix in READERS:  # a repository may offer the same rows in two formats
            patterns = _patterns(stem, suffix)
            if paths := sorted(path for pattern in patterns for path in _matching(folder, pattern)):
                found.setdefault(stem, HubFiles(repo, folder.name, suffix, paths))
    for files in found.values():
        try:
            check_complete(files.files)
        except DataError as error:
            raise DataError(
                f"Hugging Face {repo}: {error}; `hf download --repo-type dataset {repo}` completes "
                "the folder"
            ) from error
    return found, folder


def _snapshot(repo: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"Hugging Face {repo}: not whole in the cache {constants.HF_HUB_CACHE}, and the hub "
            f"cannot be reached{offline}; connect to the network, unset HF_HUB_OFFLINE, or point "
            f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}` has filled"
        ) from error
    except Exception as error:
        raise DataError(f"Hugging Face {repo}: cannot be downloaded ({reason(error)})") from error


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files by name; also a link to nowhere, which `glob` passes over in a pattern without `*`."""
    if "*" in pattern:
        return list(folder.glob(pattern))
    return [folder / pattern] if os.path.lexists(folder / pattern) else []


def _patterns(stem: str, suffix: str) -> list[str]:
    return [f"{stem}{suffix}", f"{stem}-*{suffix}", f"data/{stem}-*{suffix}"]


def reason(error: BaseException) -> str:
    """An error of another library on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
