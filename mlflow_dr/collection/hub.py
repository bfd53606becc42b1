"""Collections on the Hugging Face hub; those in Tevatron's layout have a repository for each table.

Source: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
`datasets` reads their files but, from release 4 on, refuses the loading scripts beside them; so
the files are fetched as they are and read as plain JSON lines or Parquet.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.catalogue import Examples, check_split
from mlflow_dr.collection.corpus import SCHEMA, Corpus, check_ids
from mlflow_dr.collection.examples import CachedExamples, cached_examples
from mlflow_dr.collection.hub_files import (
    READERS,
    HubFiles,
    card_configs,
    download_files,
    files_by_stem,
    repository_files,
)
from mlflow_dr.collection.hub_tables import HubTables, find_tables
from mlflow_dr.collection.irds import topics_of
from mlflow_dr.collection.jsonl import read_records
from mlflow_dr.collection.locations import HubName, hub_name
from mlflow_dr.collection.pairs import PairRecord
from mlflow_dr.collection.qrels import checked_topics
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.collection.training_files import (
    ExampleRecord,
    find_layout,
    layout_of,
    read_examples,
)
from mlflow_dr.errors import DataError, UsageError, one_line, quoted

log = logging.getLogger(__name__)

JUDGED_STEMS = ("dev", "validation", "test")
PASSAGE_COLUMNS = ("docid", "title", "text")
TITLE = "title"


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


def hub_collection(text: str) -> HubCollection | HubDataset:
    """The collection of a name on the hub, such as `mteb/scifact@REVISION:test`.

    Raises:
        UsageError: this is no name on the hub.
    """
    name = hub_name(text)
    if name is None:
        raise UsageError(
            f"{text!r} is no name on the hub; expected OWNER/NAME[/CONFIG][@REVISION][:SPLIT]"
        )
    if text == "Tevatron/msmarco-passage":
        return msmarco_passage(text)
    return HubDataset(text, name)


class HubDataset:
    """A repository of the hub; its layout is recognised when it is first read.

    Args:
        text: what the user calls it.
        name: the parts of that.
    """

    def __init__(self, text: str, name: HubName) -> None:
        self.name = text
        self.source = f"Hugging Face {text}"
        self._name = name

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries; only the split of the name, if it has one.

        Raises:
            DataError: they can neither be downloaded nor found in the cache.
            UsageError: there is no such collection or split.
        """
        if self._name.split:
            check_split(self._collection, self._name.split)
            return [self._name.split]
        return self._collection.splits

    def corpus(self) -> Corpus:
        """The passages; see `splits` for the errors."""
        return self._collection.corpus()

    def topics(self, split: str) -> Topics:
        """The judged queries of one split; see `splits` for the errors."""
        return self._collection.topics(split)

    def examples(self) -> Examples:
        """The training examples, of the split `train`; see `splits` for the errors."""
        return self._collection.examples()

    @cached_property
    def _collection(self) -> HubTables | HubCollection:
        name = self._name
        with no_such_path(self.name):
            files = repository_files(name.repo, name.revision)
            tables = find_tables(files, card_configs(name.repo, files, name.revision))
        if tables:
            return HubTables(self.name, name.repo, name.revision, name.config, tables)
        # Tevatron marks examples by id by `-new`
        corpus = re.sub(r"(-new)?$", r"-corpus\1", name.repo, count=1)
        folder = _examples_folder(self.name, name, files)
        return HubCollection(self.name, name.repo, corpus, None, name.revision, folder)


def _examples_folder(text: str, name: HubName, files: Sequence[str]) -> str:
    """The folder of a repository that has its training examples; empty for the usual places.

    Raises:
        UsageError: there is none of that name, or there are several and none is named.
        DataError: nothing in the repository looks like training examples or judged queries.
    """
    data_files = [path for path in files if path.endswith(tuple(READERS))]
    folders: set[str] = set()
    for path in data_files:
        folder, _, file = path.rpartition("/")
        if re.split(r"[.-]", file)[0] in ("train", *JUDGED_STEMS):
            folders.add("" if folder == "data" else folder)
    if name.config in folders:
        return name.config
    if not folders:
        raise DataError(
            f"Hugging Face {name.repo}: its files ({quoted(', '.join(files))}) are in no known "
            "layout; expected tables of passages, queries and judgements, or files of training "
            "examples whose names begin with train"
        )
    names = sorted(filter(None, folders))
    if not name.config and len(folders) == 1:
        return names[0]
    problem = f"has no configuration {name.config!r}" if name.config else "has several"
    raise UsageError(
        f"{text}: the repository {problem}; name one of them, such as {name.repo}/"
        f"{(names or ['NAME'])[0]}; it has: {', '.join(names) or 'none'}"
    )


@contextmanager
def no_such_path(name: str) -> Iterator[None]:
    """Errors about a repository that the user named say that it is not a local path either."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; there is no file or folder {name!r} here either") from error


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
        revision: a branch, tag or commit of `examples`; the default branch when None.
        folder: where in `examples` the files are, if not at the top or in `data/`.
    """

    def __init__(
        self,
        name: str,
        examples: str,
        corpus: str,
        judged: Mapping[str, str] | None = None,
        revision: str | None = None,
        folder: str = "",
    ) -> None:
        self.name = name
        queries = f"; ir_datasets {', '.join(judged.values())}" if judged else ""
        self.source = f"Hugging Face {examples} and {corpus}{queries}"
        self._repos = (examples, corpus)
        self._judged = judged
        self._revision, self._folder = revision, folder

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries.

        Raises:
            DataError: they can neither be downloaded nor found in the cache.
        """
        return list(self._judged if self._judged is not None else self._judged_files)

    @cached_property
    def _judged_files(self) -> dict[str, HubFiles]:
        by_stem, _ = files_by_stem(self._repos[0], JUDGED_STEMS, self._revision, self._folder)
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
        files = download_files(self._repos[0], "train", self._revision, self._folder)
        with _with_advice(files):
            layout = find_layout(files.files)
        corpus = self._corpus if layout.by_id else None
        key = f"{layout.layout}:{files.digest}"
        return cached_examples(key, _raw_examples(files, layout), files.location, corpus)


def _is_judged(files: HubFiles) -> bool:
    """Whether the first record of a split's files names a relevant passage."""
    with _with_advice(files):
        first = next(read_records(files.files[0], dict), None)
        layout = layout_of(first[1]) if first else None
        if layout is None or layout is PairRecord:  # its passages have no ids to be judged by
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

    directory = cache_entry("hub", files.digest, write, files.location)
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
