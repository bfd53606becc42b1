"""Collections on the Hugging Face hub in Tevatron's layout: one repository for each table.

Source: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
`datasets` reads their files but, from release 4 on, refuses the loading scripts beside them; so
the files are fetched as they are and read as plain JSON lines or Parquet.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.catalogue import check_split
from mlflow_dr.collection.corpus import SCHEMA, Corpus, check_ids
from mlflow_dr.collection.examples import CachedExamples, RawExample, cached_examples
from mlflow_dr.collection.irds import topics_of
from mlflow_dr.collection.jsonl import check_complete, read_records, state_of
from mlflow_dr.collection.qrels import checked_topics
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.collection.training_files import (
    ExampleRecord,
    find_layout,
    layout_of,
    read_examples,
)
from mlflow_dr.errors import DataError, one_line, quoted
from mlflow_dr.files import digest_of

log = logging.getLogger(__name__)

JUDGED_STEMS = ("dev", "validation", "test")
PASSAGE_COLUMNS = ("docid", "title", "text")
TITLE = "title"
READERS = {".parquet": "parquet", ".jsonl.gz": "json", ".jsonl": "json"}


def msmarco_passage(name: str = "msmarco") -> HubCollection:
    """MS MARCO passage ranking: Tevatron's training examples and passages, `dev` of 6,980 queries.

    Source: Bajaj et al., MS MARCO: A Human Generated MAchine Reading COmprehension Dataset, 2016.
    """
    return HubCollection(
        name,
        examples="Tevatron/msmarco-passage",
        corpus="Tevatron/msmarco-passage-corpus",
        judged={"dev": "msmarco-passage/dev/small"},
    )


def hub_collection(repo: str) -> HubCollection:
    """The collection of a repository `owner/name`, whose passages are in `owner/name-corpus`.

    For a name that ends in `-new`, Tevatron's mark of examples by id, it is `owner/...-corpus-new`.
    """
    if repo == "Tevatron/msmarco-passage":
        return msmarco_passage(repo)
    corpus = re.sub(r"(-new)?$", r"-corpus\1", repo, count=1)
    return HubCollection(repo, examples=repo, corpus=corpus)


class HubCollection:
    """Examples and passages from the Hugging Face hub, judged queries from there or ir_datasets.

    Args:
        name: what the user calls it.
        examples: repository of `train.jsonl.gz` (or `.jsonl`, Parquet), in any layout of training
            examples. Those that carry their passages need no other repository to train on.
        corpus: repository of `corpus.jsonl.gz` (or the like), rows of `docid, title, text`.
        judged: split -> id in ir_datasets whose judgements name this corpus' passages; without it
            the splits are the `dev`, `validation` and `test` files beside the examples, and the
            positives of a query in them its relevant passages.
    """

    def __init__(
        self, name: str, examples: str, corpus: str, judged: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        queries = f"; ir_datasets {', '.join(judged.values())}" if judged else ""
        self.source = f"Hugging Face {examples} and {corpus}{queries}"
        self._repos = (examples, corpus)
        self._judged = judged

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries.

        Raises:
            DataError: they can neither be downloaded nor found in the cache.
        """
        return list(self._judged if self._judged is not None else self._judged_files)

    @cached_property
    def _judged_files(self) -> dict[str, HubFiles]:
        with self._no_such_path():
            by_stem, _ = _files_by_stem(self._repos[0], JUDGED_STEMS)
        return {stem: files for stem, files in by_stem.items() if _is_judged(files)}

    def corpus(self) -> Corpus:
        """The passages, mapped from the Arrow file that `datasets` made of them.

        Raises:
            DataError: they are neither on the hub nor in the cache, lack a column or a value, or
                repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return _corpus(download_files(self._repos[1], "corpus"))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        if self._judged is not None:
            return topics_of(self._judged[split], self._corpus)
        return _topics(self._judged_files[split], self._corpus)

    def examples(self) -> CachedExamples:
        """The training examples.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, are of no known
                layout, or none of them is usable.
        """
        with self._no_such_path():
            files = download_files(self._repos[0], "train")
        with _with_advice(files):
            layout = find_layout(files.files)
        corpus = self._corpus if layout.by_id else None
        key = f"{layout.layout}:{files.digest}"
        return cached_examples(key, _raw_examples(files, layout), files.location, corpus)

    @contextmanager
    def _no_such_path(self) -> Iterator[None]:
        """Errors about a repository that the user named say that it is not a local path either."""
        try:
            yield
        except DataError as error:
            if self.name != self._repos[0]:
                raise
            raise DataError(
                f"{error}; there is no file or folder {self.name!r} here either"
            ) from error


def _is_judged(files: HubFiles) -> bool:
    """Whether the first record of a split's files names a relevant passage."""
    with _with_advice(files):
        first = next(read_records(files.files[0], dict), None)
        layout = layout_of(first[1]) if first else None
        if layout is None:
            return False
        raw = next(read_examples(files.files[:1], layout))
        return len(raw.positives) > 0


def _topics(files: HubFiles, corpus: Corpus) -> Topics:
    queries: list[Query] = []
    qrels: dict[str, dict[str, int]] = {}
    with _with_advice(files):
        layout = find_layout(files.files)
    for raw in _raw_examples(files, layout):
        queries.append(raw.query)
        relevant = (p.id if isinstance(p, Passage) else p for p in raw.positives)
        qrels.setdefault(raw.query.id, {}).update(dict.fromkeys(relevant, 1))
    return checked_topics(files.location, queries, qrels, corpus)


def _raw_examples(files: HubFiles, layout: type[ExampleRecord]) -> Iterator[RawExample]:
    with _with_advice(files):
        yield from read_examples(files.files, layout)


@contextmanager
def _with_advice(files: HubFiles) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"Hugging Face {files.repo}: {error}; {files.advice}") from error


def _rows(files: HubFiles, directory: Path) -> Any:
    """The files' rows as one `datasets.Dataset` of Arrow files, which are written to `directory`.

    Raises:
        DataError: a file is damaged, or its rows differ in their columns.
    """
    from datasets import load_dataset

    names = [str(file) for file in files.files]
    try:
        return load_dataset(
            READERS[files.suffix], data_files=names, split="train", cache_dir=str(directory)
        )
    except Exception as error:
        cause = one_line(error.__cause__ or error)
        raise DataError(f"{files.location}: cannot be read ({cause}); {files.advice}") from error


def _corpus(files: HubFiles) -> Corpus:
    """The fetched passages; they are read, checked and digested once."""

    def write(partial: Path) -> None:
        partial.mkdir()
        with TemporaryDirectory(dir=partial) as directory:
            for number, part in enumerate(_rows(files, Path(directory)).cache_files):
                Path(part["filename"]).rename(partial / f"rows-{number:05}.arrow")
        table = _table(partial, files.location)
        log.info("%s: checking %d passages, once", files.location, len(table))
        check_passages(table, files.location)
        (partial / "digest").write_text(Corpus(table).digest)

    directory = cache_entry("hub", files.digest, write)
    return Corpus(_table(directory, files.location), (directory / "digest").read_text())


def _table(directory: Path, location: str) -> pa.Table:
    """The passages, mapped from the Arrow files that `datasets` has written."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(path)) for path in sorted(directory.glob("rows-*.arrow"))]
    return passage_table(concatenate_datasets(parts).with_format("arrow")[:], location)


def passage_table(table: pa.Table, location: str) -> pa.Table:
    """Columns `id`, `title`, `text` as strings; only a column of another type is copied.

    Raises:
        DataError: `docid` or `text` is missing, or a column is of another type.
    """
    if TITLE not in table.column_names:
        table = table.append_column(TITLE, pa.nulls(len(table)))
    if missing := [name for name in PASSAGE_COLUMNS if name not in table.column_names]:
        raise DataError(
            f"{location}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}, "
            f"expected {', '.join(PASSAGE_COLUMNS)} ({TITLE} may be left out)"
        )
    columns = [table[name] for name in PASSAGE_COLUMNS]
    for name, column in zip(PASSAGE_COLUMNS, columns, strict=True):
        kind = column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_number = name == "docid" and pa.types.is_integer(kind)
        is_untitled = name == TITLE and pa.types.is_null(kind)
        if not (is_text or is_number or is_untitled):
            raise DataError(f"{location}: column {name} holds {kind}, expected strings")
    passages = pa.table(columns, names=SCHEMA.names).cast(SCHEMA)
    if passages["title"].null_count:
        passages = passages.set_column(1, SCHEMA.field("title"), passages["title"].fill_null(""))
    return passages


def check_passages(passages: pa.Table, location: str) -> None:
    """Refuse passages without id or text, and ids that are used twice.

    Raises:
        DataError: with how many there are.
    """
    for name in ("id", "text"):
        if missing := passages[name].null_count:
            raise DataError(f"{location}: {missing} of {len(passages)} passages have no {name}")
    ids = passages["id"]
    try:
        check_ids(ids)
    except DataError as error:
        raise DataError(f"{location}: {error}") from error
    if (distinct := pc.count_distinct(ids).as_py()) != len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise DataError(
            f"{location}: {len(ids) - distinct} passages repeat an id (such as "
            f"{quoted(repeated.as_py())})"
        )


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


def download_files(repo: str, stem: str) -> HubFiles:
    """The files `<stem>.*` or `<stem>-*.*` of a repository, downloaded unless they are cached.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or the repository does.
    """
    by_stem, folder = _files_by_stem(repo, [stem])
    if stem not in by_stem:
        raise DataError(
            f"Hugging Face {repo}: no {stem}.jsonl.gz, .jsonl or .parquet in {folder}; expected "
            f"Tevatron's layout; `hf download --repo-type dataset {repo}` completes the folder"
        )
    return by_stem[stem]


def _files_by_stem(repo: str, stems: Sequence[str]) -> tuple[dict[str, HubFiles], Path]:
    """The files of those stems that the repository has, and the folder that they are in."""
    folder = _snapshot(repo, [p for stem in stems for s in READERS for p in _patterns(stem, s)])
    by_stem: dict[str, HubFiles] = {}
    for stem in stems:
        for suffix in READERS:  # a repository may offer the same rows in two formats
            patterns = _patterns(stem, suffix)
            if paths := sorted(path for pattern in patterns for path in _matching(folder, pattern)):
                by_stem.setdefault(stem, HubFiles(repo, folder.name, suffix, paths))
    for files in by_stem.values():
        try:
            check_complete(files.files)
        except DataError as error:
            raise DataError(
                f"Hugging Face {repo}: {error}; `hf download --repo-type dataset {repo}` completes "
                "the folder"
            ) from error
    return by_stem, folder


def _snapshot(repo: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"Hugging Face {repo}: incomplete in the cache {constants.HF_HUB_CACHE}, and the hub "
            f"cannot be reached{offline}; connect to the network, unset HF_HUB_OFFLINE, or point "
            f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}` has filled"
        ) from error
    except Exception as error:
        raise DataError(f"Hugging Face {repo}: cannot be downloaded ({one_line(error)})") from error


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files by name, with broken links, which `glob` skips in a pattern without `*`."""
    if "*" in pattern:
        return list(folder.glob(pattern))
    return [folder / pattern] if os.path.lexists(folder / pattern) else []


def _patterns(stem: str, suffix: str) -> list[str]:
    return [f"{stem}{suffix}", f"{stem}-*{suffix}", f"data/{stem}-*{suffix}"]
