"""The BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`, each also as `.gz`.

Layout: Thakur et al., BEIR, NeurIPS Datasets and Benchmarks 2021.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from mlflow_dr.collection.catalogue import check_split
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.jsonl import (
    Id,
    answers_of,
    check_link,
    checked_id,
    first_id,
    read_records,
    state_of,
)
from mlflow_dr.collection.qrels import checked_topics, read_qrels
from mlflow_dr.collection.records import Passage, Query, Topics, unique
from mlflow_dr.errors import DataError


class PassageRecord(msgspec.Struct):
    """A line of a file of passages, in BEIR's or Tevatron's field names."""

    beir_id: Id | None = msgspec.field(name="_id", default=None)
    docid: Id | None = None
    document_id: Id | None = None
    id: Id | None = None
    title: str | None = None
    text: str | None = None
    document_text: str | None = None

    def passage(self, location: str) -> Passage:
        """The passage.

        Raises:
            DataError: it has no id or no text.
        """
        passage_id = first_id((self.beir_id, self.docid, self.document_id, self.id), location)
        text = self.document_text if self.text is None else self.text
        if not passage_id or text is None:
            missing = "'text'" if passage_id else "'_id' (nor 'docid')"
            raise DataError(f"{location}: the passage has no {missing}")
        return Passage(passage_id, self.title or "", text)


class QueryRecord(msgspec.Struct):
    """A line of `queries.jsonl`; BEIR has no field for short answers, so two places may have them.

    Attributes:
        metadata: anything, in which `answers` may be.
    """

    id: Id = msgspec.field(name="_id")
    text: str
    answers: list[str] | str | None = None
    metadata: Any = None

    def query(self, location: str) -> Query:
        """The query.

        Raises:
            DataError: the id cannot be used, or the answers are no strings.
        """
        answers = self.answers
        if answers is None and isinstance(self.metadata, dict):
            try:
                answers = msgspec.convert(self.metadata.get("answers"), list[str] | str | None)
            except msgspec.ValidationError as error:
                raise DataError(f"{location}: metadata.answers: {error}") from error
        return Query(checked_id(self.id, location), self.text, answers_of(answers))


class BeirFolder:
    """A collection in a folder of BEIR's layout."""

    def __init__(self, folder: Path, name: str | None = None, source: str | None = None) -> None:
        self._folder = folder
        self.name = name or str(folder)
        self.source = source or f"folder {folder}"

    @cached_property
    def splits(self) -> Sequence[str]:
        """Names of the files under `qrels/`."""
        files = [*self._folder.glob("qrels/*.tsv"), *self._folder.glob("qrels/*.tsv.gz")]
        names = sorted({file.name.removesuffix(".gz").removesuffix(".tsv") for file in files})
        if not names:
            raise DataError(
                f"{self._folder / 'qrels'}: no <split>.tsv there; a collection needs judgements"
            )
        return names

    def passages_file(self) -> Path:
        """`corpus.jsonl`, or `corpus.jsonl.gz`.

        Raises:
            DataError: there is neither.
        """
        return _existing(self._folder / "corpus.jsonl")

    def corpus(self) -> Corpus:
        """The passages of `corpus.jsonl`.

        Raises:
            DataError: a malformed line or a repeated id, with file:line.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return json_corpus(self.passages_file())

    def topics(self, split: str) -> Topics:
        """The judged queries of one split."""
        check_split(self, split)
        path = _existing(self._folder / "qrels" / f"{split}.tsv")
        return checked_topics(str(path), self._queries, read_qrels(path), self._corpus)

    def examples(self) -> JudgedExamples:
        """One example for each query of the train split that has a relevant passage."""
        return JudgedExamples(self.topics("train"), self._corpus)

    @cached_property
    def _queries(self) -> list[Query]:
        path = _existing(self._folder / "queries.jsonl")

        def read() -> Iterator[tuple[str, Query]]:
            for location, record in read_records(path, QueryRecord):
                yield location, record.query(location)

        return list(unique("query", read))


def json_corpus(path: Path) -> Corpus:
    """The passages of a file of JSON lines, read once and then mapped from the user's cache.

    Raises:
        DataError: a malformed line or a repeated id, with file:line.
    """

    def read() -> Iterator[tuple[str, Passage]]:
        for location, record in read_records(path, PassageRecord):
            yield location, record.passage(location)

    return cached_corpus(f"passages:{state_of(path)}", unique("passage", read), location=str(path))


def _existing(path: Path) -> Path:
    """`path`, or `path.gz` where only that exists."""
    packed = path.with_name(path.name + ".gz")
    for candidate in (path, packed):
        if os.path.lexists(candidate):
            check_link(candidate)
            return candidate
    raise DataError(f"{path}: no such file (nor {packed.name})")
