"""Collections on the Hugging Face hub in Tevatron's layout: one repository for each table.

Source: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
`datasets` reads their files but, from release 4 on, refuses the loading scripts beside them; so
the files are fetched as they are and read as plain JSON lines or Parquet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.interface import check_split
from mlflow_dr.collection.irds import topics_of
from mlflow_dr.collection.records import Topics
from mlflow_dr.collection.tevatron import (
    TevatronExamples,
    arrow_table,
    check_passages,
    passage_table,
)
from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once, cache_dir, digest_of

log = logging.getLogger(__name__)

READERS = {".parquet": "parquet", ".jsonl.gz": "json", ".jsonl": "json"}


def msmarco_passage() -> HubCollection:
    """MS MARCO passage ranking: Tevatron's training examples and passages, `dev` of 6,980 queries.

    Source: Bajaj et al., MS MARCO: A Human Generated MAchine Reading COmprehension Dataset, 2016.
    """
    return HubCollection(
        "msmarco",
        examples="Tevatron/msmarco-passage",
        corpus="Tevatron/msmarco-passage-corpus",
        judged={"dev": "msmarco-passage/dev/small"},
    )


class HubCollection:
    """Examples and passages from the Hugging Face hub, judged queries from ir_datasets.

    Args:
        name: what the user calls it.
        examples: repository of `train.jsonl.gz` (or `.jsonl`, Parquet), rows of `EXAMPLE_COLUMNS`.
        corpus: repository of `corpus.jsonl.gz` (or the like), rows of `PASSAGE_COLUMNS`.
        judged: split -> id in ir_datasets whose judgements name this corpus' passages.
    """

    def __init__(self, name: str, examples: str, corpus: str, judged: Mapping[str, str]) -> None:
        self.name = name
        queries = ", ".join(judged.values())
        self.source = f"Hugging Face {examples} and {corpus}; ir_datasets {queries}"
        self._repos = (examples, corpus)
        self._judged = judged

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries."""
        return list(self._judged)

    def corpus(self) -> Corpus:
        """The passages, mapped from the Arrow file that `datasets` made of them.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, lack a column or a
                value, or repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return _corpus(_fetched(self._repos[1], "corpus"))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        return topics_of(self._judged[split], self._corpus)

    def examples(self) -> TevatronExamples:
        """The training examples.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, lack a column, or
                none of them is usable.
        """
        fetched = _fetched(self._repos[0], "train")
        return TevatronExamples(fetched.rows(), fetched.where, fetched.digest)


class _Fetched(NamedTuple):
    """Data files of one format, of one repository at one commit, on this machine."""

    repo: str
    commit: str
    reader: str
    files: list[Path]

    @property
    def where(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"Hugging Face {self.repo} ({self.files[0].name}{more})"

    @property
    def digest(self) -> str:
        """Names the contents: a commit of the hub never changes."""
        return digest_of("hub", self.repo, self.commit, *(file.name for file in self.files))

    def rows(self) -> Any:
        """The files' rows as one `datasets.Dataset`, an Arrow file mapped from the cache.

        Raises:
            DataError: a file is damaged, or its rows have not all the same columns.
        """
        from datasets import load_dataset

        files = [str(file) for file in self.files]
        try:
            return load_dataset(self.reader, data_files=files, split="train")
        except Exception as error:
            raise DataError(
                f"{self.where}: cannot be read ({_reason(error.__cause__ or error)}); if a file is "
                f"damaged, `hf download --force-download --repo-type dataset {self.repo}` "
                "replaces it"
            ) from error


def _fetched(repo: str, stem: str) -> _Fetched:
    """The files `<stem>.*` or `<stem>-*.*` of a repository, downloaded where the cache lacks them.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or the repository does.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = {suffix: _patterns(stem, suffix) for suffix in READERS}
    every_pattern = [pattern for group in patterns.values() for pattern in group]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=every_pattern))
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"Hugging Face {repo}: not whole in the cache {constants.HF_HUB_CACHE}, and the hub "
            f"cannot be reached{offline}; connect to the network, unset HF_HUB_OFFLINE, or point "
            f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}` has filled"
        ) from error
    except Exception as error:
        raise DataError(f"Hugging Face {repo}: cannot be downloaded ({_reason(error)})") from error
    for suffix, group in patterns.items():  # a repository may offer the same rows in two formats
        if files := sorted(path for pattern in group for path in folder.glob(pattern)):
            return _Fetched(repo, folder.name, READERS[suffix], files)
    raise DataError(
        f"Hugging Face {repo}: no {stem}.jsonl.gz, .jsonl or .parquet in {folder}; "
        f"expected Tevatron's layout; `hf download --repo-type dataset {repo}` completes the folder"
    )


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _patterns(stem: str, suffix: str) -> list[str]:
    return [f"{stem}{suffix}", f"{stem}-*{suffix}", f"data/{stem}-*{suffix}"]


def _corpus(fetched: _Fetched) -> Corpus:
    """The fetched passages; ids are checked and contents digested once for each commit."""
    table = passage_table(arrow_table(fetched.rows()), fetched.where)

    def check_and_digest(partial: Path) -> None:
        log.info("%s: checking %d passages, once", fetched.where, len(table))
        check_passages(table, fetched.where)
        partial.write_text(Corpus(table).digest)

    digest = build_once(cache_dir() / "digests" / fetched.digest, check_and_digest).read_text()
    return Corpus(table, digest)
