"""Repositories of the Hugging Face hub: which files they have, and copies of these here."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_dr.collection.jsonl import check_complete, state_of
from mlflow_dr.errors import DataError, one_line
from mlflow_dr.files import digest_of
from mlflow_dr.hub import hub_is_away

log = logging.getLogger(__name__)

READERS = {".parquet": "parquet", ".jsonl.gz": "json", ".jsonl": "json", ".csv": "csv"}
"""Suffixes of data files, and what `datasets` calls their format."""
CARD = "README.md"


class HubFiles(NamedTuple):
    """Data files of one format, of one repository at one commit, on this machine."""

    repo: str
    commit: str
    suffix: str
    files: list[Path]

    @property
    def location(self) -> str:
        """The repository and its first file, for messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"Hugging Face {self.repo} ({self.files[0].name}{more})"

    @property
    def digest(self) -> str:
        """Names the commit and the present contents of its files; the key of a cache."""
        return digest_of("hub", self.repo, self.commit, *map(state_of, self.files))

    @property
    def advice(self) -> str:
        """What to do about a damaged file."""
        return (
            "if a file is damaged, "
            f"`hf download --force-download --repo-type dataset {self.repo}` replaces it"
        )


def repository_files(repo: str, revision: str | None = None) -> list[str]:
    """The paths of all files of a repository; of those that are cached, if it cannot be reached.

    Raises:
        DataError: there is no such repository, or nothing of it is cached.
    """
    from huggingface_hub import HfApi

    if not hub_is_away():
        try:
            info = HfApi().dataset_info(repo, revision=revision)
            return sorted(file.rfilename for file in info.siblings or ())
        except Exception as error:  # noqa: BLE001 - the cache may do, else `snapshot` raises
            log.debug("Hugging Face %s: its files cannot be listed (%s)", repo, one_line(error))
    folder = snapshot(repo, [CARD], revision)
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def card_configs(repo: str, files: Sequence[str], revision: str | None = None) -> list[Any]:
    """The configurations that the card of a repository lists; empty without a card.

    Raises:
        DataError: the card cannot be downloaded.
    """
    if CARD not in files:
        return []
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        card = metadata_load(snapshot(repo, [CARD], revision) / CARD)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"Hugging Face {repo}: {CARD} cannot be read ({one_line(error)})"
        ) from error
    configs = card.get("configs") if isinstance(card, dict) else None
    return configs if isinstance(configs, list) else []


def download_paths(repo: str, paths: Sequence[str], revision: str | None = None) -> list[Path]:
    """Files of a repository by their paths, downloaded unless they are cached.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or a file is missing.
    """
    folder = snapshot(repo, [glob.escape(path) for path in paths], revision)
    files = [folder / path for path in paths]
    _check(repo, files)
    return files


def download_files(repo: str, stem: str, revision: str | None = None, folder: str = "") -> HubFiles:
    """The files `<stem>.*` or `<stem>-*.*` of a repository, downloaded unless they are cached.

    Args:
        repo: the repository.
        stem: such as `train`.
        revision: a branch, tag or commit; the default branch when None.
        folder: where they are, if not at the top or in `data/`.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or the repository does.
    """
    by_stem, directory = files_by_stem(repo, [stem], revision, folder)
    if stem not in by_stem:
        raise DataError(
            f"Hugging Face {repo}: no {stem}.jsonl.gz, .jsonl or .parquet in {directory}; expected "
            f"Tevatron's layout; `hf download --repo-type dataset {repo}` completes the folder"
        )
    return by_stem[stem]


def files_by_stem(
    repo: str, stems: Sequence[str], revision: str | None = None, folder: str = ""
) -> tuple[dict[str, HubFiles], Path]:
    """The files of those stems that the repository has, and the directory that they are in."""
    wanted = [p for stem in stems for suffix in READERS for p in patterns(stem, suffix, folder)]
    directory = snapshot(repo, wanted, revision)
    by_stem: dict[str, HubFiles] = {}
    for stem in stems:
        for suffix in READERS:  # a repository may offer the same rows in two formats
            found = [
                path
                for pattern in patterns(stem, suffix, folder)
                for path in _matching(directory, pattern)
            ]
            if found:
                by_stem.setdefault(stem, HubFiles(repo, directory.name, suffix, sorted(found)))
    for files in by_stem.values():
        _check(repo, files.files)
    return by_stem, directory


def patterns(stem: str, suffix: str, folder: str = "") -> list[str]:
    """How the files of a stem are called."""
    if folder:
        return [f"{folder}/{stem}{suffix}", f"{folder}/{stem}-*{suffix}"]
    return [f"{stem}{suffix}", f"{stem}-*{suffix}", f"data/{stem}-*{suffix}"]


def snapshot(repo: str, allowed: Sequence[str], revision: str | None = None) -> Path:
    """The directory of a repository's copy, with the files that match a pattern.

    Raises:
        DataError: the hub cannot be reached and nothing is cached, or there is no such repository.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(allowed),
                local_files_only=hub_is_away(),
            )
        )
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"Hugging Face {repo}: incomplete in the cache {constants.HF_HUB_CACHE}, and the hub "
            f"cannot be reached{offline}; connect to the network, unset HF_HUB_OFFLINE, or point "
            f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}` has filled"
        ) from error
    except Exception as error:
        raise DataError(f"Hugging Face {repo}: cannot be downloaded ({one_line(error)})") from error


def _check(repo: str, files: Sequence[Path]) -> None:
    try:
        check_complete(files)
    except DataError as error:
        raise DataError(
            f"Hugging Face {repo}: {error}; `hf download --repo-type dataset {repo}` completes "
            "the folder"
        ) from error


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files by name, with broken links, which `glob` skips in a pattern without `*`."""
    if "*" in pattern:
        return list(folder.glob(pattern))
    return [folder / pattern] if os.path.lexists(folder / pattern) else []
