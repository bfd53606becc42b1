"""The BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`, each also as `.gz`.

Layout: Thakur et al., BEIR, NeurIPS Datasets and Benchmarks 2021.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.formats import check_split
from mlflow_dr.collection.jsonl import Record, check_link, identifier, json_lines, text, texts
from mlflow_dr.collection.qrels import checked_topics, read_qrels
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.collection.training_files import corpus_of_file
from mlflow_dr.errors import DataError, quoted

ID = "_id"


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

    def corpus(self) -> Corpus:
        """The passages of `corpus.jsonl`.

        Raises:
            DataError: a malformed line or a repeated id, with file:line.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return corpus_of_file(_existing(self._folder / "corpus.jsonl"))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split."""
        path = self._qrels_path(split)
        return checked_topics(str(path), self._queries.values(), read_qrels(path), self._corpus)

    def examples(self) -> JudgedExamples:
        """One example for each query of the train split that has a relevant passage."""
        return JudgedExamples(self.topics("train"), self._corpus)

    @cached_property
    def _queries(self) -> dict[str, Query]:
        path = _existing(self._folder / "queries.jsonl")
        queries: dict[str, Query] = {}
        for number, record in json_lines(path):
            where = f"{path}:{number}"
            query_id, content = identifier(record, ID, where), text(record, "text", where)
            query = Query(query_id, content, _answers(record, where))
            if query.id in queries:
                raise DataError(f"{where}: query id {quoted(query.id)} is used twice")
            queries[query.id] = query
        return queries

    def _qrels_path(self, split: str) -> Path:
        check_split(self, split)
        return _existing(self._folder / "qrels" / f"{split}.tsv")


def _answers(record: Record, where: str) -> tuple[str, ...]:
    """Short answers, which BEIR's layout has no field for: `answers`, or that of `metadata`."""
    metadata = record.get("metadata")
    holder = metadata if "answers" not in record and isinstance(metadata, dict) else record
    return texts(holder, "answers", where)


def _existing(path: Path) -> Path:
    """`path`, or `path.gz` where only that exists."""
    packed = path.with_name(path.name + ".gz")
    for there in (path, packed):
        if os.path.lexists(there):
            check_link(there)
            return there
    raise DataError(f"{path}: no such file (nor {packed.name})")
