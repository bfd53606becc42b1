"""Files that the reader's data is made of: a retriever's results, and DPR's gold passages.

Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlflow_dr.collection.jsonl import Id, answers_of, read_records
from mlflow_dr.errors import DataError
from mlflow_dr.files import opened


class RetrievedPassage(msgspec.Struct):
    """A passage as a retriever found it."""

    text: str
    title: str | None = None
    id: Id | None = None
    has_answer: bool | None = None


class RetrievedQuestion(msgspec.Struct):
    """A question with the passages of a retriever, best first."""

    question: str
    ctxs: list[RetrievedPassage]
    answers: list[str] | str | None = None


class RetrievalResult(NamedTuple):
    """A question with its answers and the passages of a retriever, best first."""

    location: str
    question: str
    answers: tuple[str, ...]
    passages: list[RetrievedPassage]


def read_results(path: Path) -> Iterator[RetrievalResult]:
    """The questions of a file of results, one at a time.

    Args:
        path: a JSON array as DPR's `dense_retriever` writes it, or JSON lines; `.gz` or plain.

    Raises:
        DataError: the file is missing, damaged, or has other records.
    """
    for location, record in read_records(path, RetrievedQuestion):
        answers = answers_of(record.answers)
        yield RetrievalResult(location, record.question, answers, record.ctxs)


class _GoldPassage(msgspec.Struct):
    question: str
    title: str
    question_tokens: str | None = None


class _GoldFile(msgspec.Struct):
    data: list[_GoldPassage]


class GoldTitles:
    """The title of the article that a question was made from.

    Args:
        path: DPR's file of gold passages; None if there is none.

    Raises:
        DataError: the file is missing, damaged, or has another layout.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._questions: dict[str, str] = {}
        self._titles: dict[str, str] = {}
        for passage in _gold_passages(path) if path else ():
            tokens = passage.question_tokens or passage.question
            self._questions[tokens] = passage.question
            self._titles[passage.question] = self._titles[tokens] = passage.title.lower()

    def __len__(self) -> int:
        return len(self._titles)

    def original(self, question: str) -> str:
        """The question as it was asked, where results have its tokens between blanks."""
        return self._questions.get(question, question)

    def matches(self, question: str, title: str) -> bool:
        """Whether a title is the question's, in upper or lower case."""
        return self._titles.get(question) == title.lower()


def _gold_passages(path: Path) -> list[_GoldPassage]:
    with opened(path) as file:
        content = file.read()
    try:
        return msgspec.json.decode(content, type=_GoldFile).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f'{path}: cannot be read ({error}); expected DPR\'s file of gold passages, {{"data": '
            '[{"question": ..., "title": ..., "context": ...}, ...]}'
        ) from error
