"""The BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`, each also as `.gz`.

Layout: Thakur et al., BEIR, NeurIPS Datasets and Benchmarks 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.interface import check_split
from mlflow_dr.collection.judgements import checked_topics, read_qrels
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import DataError
from mlflow_dr.files import read_lines

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
        path = _existing(self._folder / "corpus.jsonl")
        state = path.stat()
        key = f"beir:{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        return cached_corpus(key, _unique_passages(path))

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
        for number, record in _records(path):
            query = Query(_identifier(record, path, number), _text(record, "text", path, number))
            if query.id in queries:
                raise DataError(f"{path}:{number}: query id {query.id!r} is used twice")
            queries[query.id] = query
        return queries

    def _qrels_path(self, split: str) -> Path:
        check_split(self, split)
        return _existing(self._folder / "qrels" / f"{split}.tsv")


def _unique_passages(path: Path) -> Iterator[Passage]:
    """All passages; an error that names both lines when an id is used twice."""
    seen: dict[str, int] = {}
    for number, record in _records(path):
        passage_id = _identifier(record, path, number)
        if (first := seen.setdefault(passage_id, number)) != number:
            raise DataError(
                f"{path}:{number}: passage id {passage_id!r} was used on line {first} already"
            )
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise DataError(f"{path}:{number}: 'title' is not a string")
        yield Passage(passage_id, title, _text(record, "text", path, number))
    if not seen:
        raise DataError(f"{path}: the corpus has no passages")


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _identifier(record: dict[str, Any], path: Path, number: int) -> str:
    value = record.get(ID)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{path}:{number}: no {ID!r}, or not a string; got {value!r}")
    return value


def _text(record: dict[str, Any], field: str, path: Path, number: int) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{path}:{number}: no {field!r}, or not a string; got {value!r}")
    return value


def _existing(path: Path) -> Path:
    """`path`, or `path.gz` where only that exists."""
    packed = path.with_name(path.name + ".gz")
    if path.exists():
        return path
    if packed.exists():
        return packed
    raise DataError(f"{path}: no such file (nor {packed.name})")
