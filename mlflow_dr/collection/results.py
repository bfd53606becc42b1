"""Results of a retriever as DPR writes them, and its file of gold passages: a reader's input.

A result is `{question, answers, ctxs: [{id, title, text, score, has_answer}]}`, the passages best
first. DPR writes a score as a string, and reads no other key in a passage.
Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from mlflow_dr.collection.jsonl import Id, answers_of, read_records
from mlflow_dr.errors import DataError
from mlflow_dr.files import atomic_write, opened


class ResultPassage(msgspec.Struct):
    """A passage that was found for a question."""

    id: Id
    text: str
    title: str | None = None
    score: float | str | None = None
    has_answer: bool | None = None


class Result(msgspec.Struct):
    """A question, its answers, and the passages that were found for it, the best first."""

    question: str
    ctxs: list[ResultPassage]
    answers: list[str] | str = ()  # type: ignore[assignment]
    id: Id | None = None

    @property
    def answer_list(self) -> tuple[str, ...]:
        """The answers, which a file may have as a list or as one string."""
        return answers_of(self.answers)


class GoldPassage(msgspec.Struct):
    """The passage that a question was asked about.

    Attributes:
        question_tokens: the question in another spelling, where the data set was tokenised.
    """

    question: str
    title: str
    context: str
    question_tokens: str | None = None
    example_id: Id | None = None


class _GoldFile(msgspec.Struct):
    data: list[GoldPassage]


def read_results(path: Path) -> Iterator[tuple[str, Result]]:
    """The results of a file, a JSON array or JSON lines, each with its location for messages.

    Raises:
        DataError: the file is missing or damaged, or a record is no result.
    """
    return read_records(path, Result)


def read_gold_passages(path: Path) -> list[GoldPassage]:
    """The passages of DPR's file `{"data": [{question, title, context, ...}]}`.

    Raises:
        DataError: the file is missing, damaged or of another layout.
    """
    with opened(path) as file:
        raw = file.read()
    try:
        return msgspec.json.decode(raw, type=_GoldFile).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: no file of gold passages ({error}); expected "
            '{"data": [{"question": ..., "title": ..., "context": ...}]}'
        ) from error


def write_results(path: Path, results: Iterable[Result], scores_as_text: bool = False) -> None:
    """Write results as a JSON array, indented as DPR's.

    Args:
        path: the file.
        results: in the order of the questions.
        scores_as_text: write scores as strings, as DPR does.
    """
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        separator = "["
        for result in results:
            text = json.dumps(_plain(result, scores_as_text), indent=4)
            file.write(separator + "\n" + "\n".join(f"    {line}" for line in text.split("\n")))
            separator = ","
        file.write("\n]\n" if separator == "," else "[]\n")


def _score(score: float | str | None, as_text: bool) -> float | str:
    """A score in the fewest digits that fp32 needs."""
    text = str(np.float32(score or 0.0))
    return text if as_text else float(text)


def _plain(result: Result, scores_as_text: bool) -> dict[str, object]:
    passages = [
        {
            "id": passage.id,
            "title": passage.title or "",
            "text": passage.text,
            "score": _score(passage.score, scores_as_text),
            "has_answer": bool(passage.has_answer),
        }
        for passage in result.ctxs
    ]
    return {"question": result.question, "answers": list(result.answer_list), "ctxs": passages}
