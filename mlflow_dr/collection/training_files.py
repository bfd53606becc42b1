"""Training examples in a file or folder of the user's, in any of the known layouts.

The layout is recognised by the fields of the first record; `LAYOUTS` lists them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mlflow_dr.collection.beir import json_corpus
from mlflow_dr.collection.catalogue import check_split
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.dpr import DprRecord, DprRecordWithOthers, table_corpus
from mlflow_dr.collection.examples import CachedExamples, cached_examples, topics_of_examples
from mlflow_dr.collection.jsonl import (
    SUFFIXES,
    check_complete,
    fields_of,
    named_files,
    read_records,
    state_of,
)
from mlflow_dr.collection.pairs import PairRecord, is_pair, read_pairs
from mlflow_dr.collection.rank_pool import RankPool, rank_pool
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Topics
from mlflow_dr.collection.tevatron import TevatronIdRecord, TevatronRecord, TevatronTokenRecord
from mlflow_dr.errors import DataError, UsageError

log = logging.getLogger(__name__)

TRAIN = re.compile(r"(^|[._-])train", re.IGNORECASE)
OTHER = re.compile(
    r"(^|[._-])(corpus|psgs|queries|qas?|dev|valid|validation|val|test|eval)([._\d-]|$)",
    re.IGNORECASE,
)
POOL_SPLIT = "dev"


class ExampleRecord(Protocol):
    """One record of a layout of training files: a `msgspec.Struct`.

    Attributes:
        layout: the name of the layout.
        fields: those that it needs, for messages.
        by_id: whether its passages are ids, to be looked up in a corpus.
    """

    layout: ClassVar[str]
    fields: ClassVar[str]
    by_id: ClassVar[bool]

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example.

        Args:
            index: the number of records before it in all files.
            location: `file:line` or `file[index]`, for messages.

        Raises:
            DataError: an id cannot be used, or fields contradict each other.
        """


LAYOUTS: Mapping[str, type[ExampleRecord]] = {
    "positive_ctxs": DprRecord,
    "positives": TevatronTokenRecord,
    "positive_document_ids": TevatronIdRecord,
    "positive_passages": TevatronRecord,
}
"""The layouts by the field that no other layout has."""


class TrainingFiles:
    """A collection that has training examples and no judged queries.

    Ids are looked up in the file of passages beside the examples, else in the given corpus.

    Args:
        path: a file, or a folder whose files are read in the order of their names.
        corpus: has the passages that ids name where no file beside the examples does.
        others: whether negatives that are not hard are read, too.
    """

    splits: Sequence[str] = ()

    def __init__(
        self, path: Path, corpus: Callable[[], Corpus] | None = None, others: bool = False
    ) -> None:
        self._path = path
        self._given_corpus = corpus
        self._others = others
        self.name = str(path)
        self.source = f"{'folder' if path.is_dir() else 'file'} {path}"

    def corpus(self) -> Corpus:
        """The corpus whose rows the examples' passages are."""
        return self.examples().passages

    def topics(self, split: str) -> Topics:
        """A training file has no judged queries.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} has training examples and no judged queries, so no split {split!r}"
        )

    def examples(self) -> CachedExamples:
        """The training examples.

        Raises:
            DataError: a malformed record, with file:line; no known layout; no usable record; or
                no corpus to look up ids in.
        """
        return self._examples

    def with_others(self) -> TrainingFiles:
        """The same files, read with negatives that are not hard."""
        return TrainingFiles(self._path, self._given_corpus, others=True)

    @cached_property
    def _examples(self) -> CachedExamples:
        files = training_files(self._path)
        layout = find_layout(files)
        if self._others:
            if layout is not DprRecord:
                raise UsageError(
                    f"{self._path}: the layout {layout.layout} has hard negatives only; leave out "
                    "--other_negatives"
                )
            layout = DprRecordWithOthers
        key = "\n".join([layout.layout, *map(state_of, files)])
        corpus = self._corpus_of_ids() if layout.by_id else None
        return cached_examples(key, read_examples(files, layout), str(self._path), corpus)

    def _corpus_of_ids(self) -> Corpus:
        folder = self._path if self._path.is_dir() else self._path.parent
        if file := passages_beside(folder):
            return corpus_of_file(file)
        if self._given_corpus:
            return self._given_corpus()
        raise DataError(
            f"{self._path}: its records name passages by id, and {folder} has no corpus.jsonl "
            "(nor .gz, nor psgs*.tsv) to look them up in; put the passages there, or name the "
            "collection that has them"
        )


class PassagePool:
    """`pool:FILE`: the questions of training examples, judged on the file's own passages.

    DPR's development files are such: each question has its positives, and the passages of all
    questions together are searched. This is cheap, and easier than the whole corpus.

    Args:
        path: a file of training examples, or a folder of such files.

    Raises:
        UsageError: there is no such file.
    """

    splits: Sequence[str] = (POOL_SPLIT,)

    def __init__(self, path: Path) -> None:
        self.name = f"pool:{path}"
        if not path.exists():
            raise UsageError(
                f"{self.name}: no such file; expected pool:FILE with training examples"
            )
        self._path = path
        self._files = TrainingFiles(path)
        self.source = f"questions and passages of {self._files.source}"

    def corpus(self) -> Corpus:
        """All passages of all examples."""
        return self.examples().passages

    def topics(self, split: str) -> Topics:
        """The questions; all positives of a question are relevant.

        Raises:
            UsageError: another split than `dev`.
        """
        check_split(self, split)
        return self._topics

    @cached_property
    def _topics(self) -> Topics:
        examples = self.examples()
        return topics_of_examples(examples, range(len(examples)))

    def examples(self) -> CachedExamples:
        """The examples themselves."""
        return self._files.examples()

    def rank_pool(self) -> RankPool:
        """Questions and all of their passages, each text once, as DPR's average rank takes them.

        Raises:
            DataError: a malformed record, passages by id, or no question with a positive.
        """
        return self._rank_pool

    @cached_property
    def _rank_pool(self) -> RankPool:
        files = training_files(self._path)
        layout = find_layout(files)
        if layout.by_id:
            raise DataError(f"{self.name}: its passages are ids; average rank needs their texts")
        layout = DprRecordWithOthers if layout is DprRecord else layout
        return rank_pool(self.name, read_examples(files, layout))


def find_layout(files: Sequence[Path]) -> type[ExampleRecord]:
    """The layout of the first record in these files.

    Raises:
        DataError: there are no records, the layout is unknown, or the file is damaged.
    """
    for file in files:
        for location, record in read_records(file, dict):
            if layout := layout_of(record):
                return layout
            kinds: list[type[ExampleRecord]] = [*LAYOUTS.values(), PairRecord]
            layouts = "; ".join(f"{kind.layout} ({kind.fields})" for kind in kinds)
            raise DataError(
                f"{location}: a record with the fields {fields_of(record)}; training examples have "
                f"those of one of: {layouts}"
            )
    raise DataError(f"{', '.join(map(str, files))}: no records; expected training examples")


def layout_of(record: Mapping[str, Any]) -> type[ExampleRecord] | None:
    """The layout of a record; None for an unknown one."""
    pairs = PairRecord if is_pair(record) else None
    return next((layout for field, layout in LAYOUTS.items() if field in record), pairs)


def read_examples(files: Sequence[Path], layout: type[ExampleRecord]) -> Iterator[RawExample]:
    """The records of all files, in order, numbered from 0 through all of them.

    Raises:
        DataError: a file is damaged or a record is not in this layout, with file:line.
    """
    if layout is PairRecord:
        yield from read_pairs(files)
        return
    indexes = count()
    for file in files:
        for location, record in read_records(file, layout):
            yield record.example(next(indexes), location)


def corpus_of_file(path: Path) -> Corpus:
    """The passages of a file: DPR's table for `.tsv` and `.tsv.gz`, else JSON lines.

    Raises:
        DataError: a malformed line or a repeated id, with file:line.
    """
    is_table = path.name.removesuffix(".gz").endswith(".tsv")
    return table_corpus(path) if is_table else json_corpus(path)


def passages_beside(folder: Path) -> Path | None:
    """The file of passages in a folder: `corpus.jsonl`, or DPR's `psgs*.tsv`; None without one.

    Raises:
        DataError: it has several of DPR's tables.
    """
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        if os.path.lexists(folder / name):  # a broken link is refused when it is read
            return folder / name
    tables = sorted([*folder.glob("psgs*.tsv"), *folder.glob("psgs*.tsv.gz")])
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{folder}: several tables of passages, {names}; leave only one of them")
    return tables[0] if tables else None


def training_files(path: Path) -> list[Path]:
    """The files of training examples: the path itself, or those of a folder, by name.

    In a folder these are the files with `train` at the start of a part of their name
    (`nq-train.json`), else all but those of passages, of queries and of other splits
    (`nq-dev.json`, `test.jsonl`).

    Raises:
        DataError: there are none.
    """
    if not path.is_dir():
        return [path]
    files = named_files(path)
    chosen = _choose(files)
    check_complete(chosen)
    if not chosen:
        present = f"only {', '.join(file.name for file in files)}" if files else "none"
        raise DataError(
            f"{path}: expected files of training examples ({', '.join(SUFFIXES)}), there are "
            f"{present}; name the file itself to train on it"
        )
    names = ", ".join(file.name for file in chosen)
    log.info("%s: of %d files these are read: %s", path, len(files), names)
    return chosen


def has_training_files(folder: Path) -> bool:
    """Whether a folder has files that `training_files` would choose."""
    return bool(_choose(named_files(folder, warn=False)))


def _choose(files: Sequence[Path]) -> list[Path]:
    others = {file for file in files if OTHER.search(file.name)}
    train = [file for file in files if TRAIN.search(file.name)]
    plain = [file for file in train if file not in others]  # no `train_queries.jsonl`
    return plain or train or [file for file in files if file not in others]
