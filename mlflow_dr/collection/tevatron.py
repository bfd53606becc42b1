"""Tevatron's training examples: with passages, by passage id, or tokenised.

Layouts: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022; by id:
Ma et al., Tevatron 2.0: Unified Document Retrieval Toolkit across Scale, Language, and Modality,
2025. `mlflow-dr mine` writes the one by id.
"""

from __future__ import annotations

from math import nan
from typing import ClassVar

import msgspec

from mlflow_dr.collection.jsonl import (
    Id,
    Score,
    TextOrTokens,
    answers_of,
    checked_id,
    first_id,
    text_and_tokens,
)
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError


class TevatronPassage(msgspec.Struct):
    """A passage of a query; one without id is identified by its content."""

    text: str
    docid: Id | None = None
    title: str | None = None
    score: Score | None = None


class TevatronRecord(msgspec.Struct):
    """A query with its passages; a `score` in a passage is a teacher's.

    Without a query id the record's index is the id.
    """

    layout: ClassVar[str] = "Tevatron"
    fields: ClassVar[str] = "query, positive_passages"
    by_id: ClassVar[bool] = False

    positive_passages: list[TevatronPassage] | None
    negative_passages: list[TevatronPassage] | None = None
    query_id: Id | None = None
    query: str | None = None
    answers: list[str] | str | None = None

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example; see `ExampleRecord`."""
        query_id = first_id((self.query_id,), location) or str(index)
        sides = {
            "positive_passages": self.positive_passages or (),
            "negative_passages": self.negative_passages or (),
        }
        positives, negatives = (
            [
                Passage(first_id((p.docid,), f"{location}: {field}"), p.title or "", p.text)
                for p in passages
            ]
            for field, passages in sides.items()
        )
        positive_scores, negative_scores = (
            [nan if p.score is None else p.score for p in passages] for passages in sides.values()
        )
        query = Query(query_id, self.query or "", answers_of(self.answers))
        return RawExample(location, query, positives, negatives, positive_scores, negative_scores)


class TevatronIdRecord(msgspec.Struct):
    """A query with ids of passages, which are looked up in a corpus.

    The query's text may be under `query` instead, short answers under `answers` or `answer`. Two
    optional fields are this package's own: `positive_scores` and `negative_scores`, a teacher's
    score of each passage.
    """

    layout: ClassVar[str] = "Tevatron by id"
    fields: ClassVar[str] = "query_text, positive_document_ids"
    by_id: ClassVar[bool] = True

    positive_document_ids: list[Id] | None
    negative_document_ids: list[Id] | None = None
    query_id: Id | None = None
    query_text: str | None = None
    query: str | None = None
    answers: list[str] | str | None = None
    answer: list[str] | str | None = None
    positive_scores: list[Score | None] | None = None
    negative_scores: list[Score | None] | None = None

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example; see `ExampleRecord`."""
        query = Query(
            first_id((self.query_id,), location) or str(index),
            self.query_text or self.query or "",
            answers_of(self.answers) or answers_of(self.answer),
        )
        positives = _checked_ids(self.positive_document_ids, "positive_document_ids", location)
        negatives = _checked_ids(self.negative_document_ids, "negative_document_ids", location)
        return RawExample(
            location,
            query,
            positives,
            negatives,
            _scores(self.positive_scores, "positive_scores", len(positives), location),
            _scores(self.negative_scores, "negative_scores", len(negatives), location),
        )


class TevatronTokenRecord(msgspec.Struct):
    """A query with its passages, all as token ids without special tokens, or all as strings.

    Tevatron trains on this form after its own tokenising. Passages have no ids and are identified
    by their content.
    """

    layout: ClassVar[str] = "Tevatron tokenised"
    fields: ClassVar[str] = "query, positives"
    by_id: ClassVar[bool] = False

    positives: list[TextOrTokens] | None
    negatives: list[TextOrTokens] | None = None
    query_id: Id | None = None
    query: TextOrTokens | None = None

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example; see `ExampleRecord`."""
        text, tokens = text_and_tokens(self.query or "")
        query = Query(first_id((self.query_id,), location) or str(index), text, (), tokens)
        positives, negatives = (
            [Passage("", "", *text_and_tokens(passage)) for passage in side or ()]
            for side in (self.positives, self.negatives)
        )
        if positives and text and positives[0].tokens is not None:
            raise DataError(
                f"{location}: the query is text and its passages are token ids; tokenise both"
            )
        if positives and tokens and positives[0].tokens is None:
            raise DataError(
                f"{location}: the query is token ids and its passages are text; tokenise both"
            )
        return RawExample(location, query, positives, negatives)


def _checked_ids(values: list[Id] | None, field: str, location: str) -> list[str]:
    """Ids as strings; most lists are checked at once, because a file may have tens of millions."""
    if not values:
        return []
    if all(type(value) is str for value in values):
        joined = " ".join(values)  # type: ignore[arg-type]
        if "\0" not in joined and joined.split() == values:
            return values  # type: ignore[return-value]
    return [
        checked_id(value, f"{location}: {field}[{index}]") for index, value in enumerate(values)
    ]


def _scores(
    values: list[Score | None] | None, field: str, expected: int, location: str
) -> list[float]:
    if values and len(values) != expected:
        raise DataError(
            f"{location}: {len(values)} {field} for {expected} passages; give one for each"
        )
    return [nan if value is None else value for value in values or ()]
