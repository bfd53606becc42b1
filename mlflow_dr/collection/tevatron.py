"""Tevatron's training examples: each line has a query and its passages, as text or as token ids.

Layout: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
"""

from __future__ import annotations

from typing import Any

from mlflow_dr.collection.examples import RawExample
from mlflow_dr.collection.jsonl import (
    Record,
    identifiers,
    listed,
    number,
    optional_identifier,
    optional_text,
    text,
    text_or_tokens,
    texts,
)
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, quoted


def tevatron_example(record: Record, index: int, where: str) -> RawExample:
    """`query_id, query, positive_passages, negative_passages`, where there are any `answers`.

    A passage is `docid, title, text`, without id known by its content; a `score` in it is a
    teacher's. Without a query id the record's index stands for it.

    Raises:
        DataError: a field is not of its type, or a passage has no text.
    """
    positives, positive_scores = _passages(record, "positive_passages", where)
    negatives, negative_scores = _passages(record, "negative_passages", where)
    query = Query(
        optional_identifier(record, ("query_id",), where) or str(index),
        optional_text(record, "query", where),
        texts(record, "answers", where),
    )
    return RawExample(where, query, positives, negatives, positive_scores, negative_scores)


def _passages(record: Record, field: str, where: str) -> tuple[list[Passage], list[float]]:
    passages: list[Passage] = []
    scores: list[float] = []
    for index, item in enumerate(listed(record, field, where)):
        place = f"{where}: {field}[{index}]"
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected docid, title and text, got {quoted(item)}")
        passage_id = optional_identifier(item, ("docid",), place)
        title = optional_text(item, "title", place)
        passages.append(Passage(passage_id, title, text(item, "text", place)))
        scores.append(number(item, "score", place))
    return passages, scores


def plain_example(record: Record, index: int, where: str) -> RawExample:
    """`query, positives, negatives`, each a list of token ids without special tokens, or a string.

    This is the form that Tevatron trains on after its own tokenising. Passages have no id and are
    known by their content; the record's index is the query's id where it has no `query_id`.

    Raises:
        DataError: a field is neither text nor token ids, or the query is not what the passages are.
    """
    query_id = optional_identifier(record, ("query_id",), where) or str(index)
    content, tokens = text_or_tokens(record.get("query") or "", f"{where}: query")
    query = Query(query_id, content, (), tokens)
    positives, negatives = (
        [
            _plain_passage(item, f"{where}: {field}[{place}]")
            for place, item in enumerate(listed(record, field, where))
        ]
        for field in ("positives", "negatives")
    )
    if positives and query.text and positives[0].tokens is not None:
        raise DataError(f"{where}: the query is text, its passages are token ids; tokenise both")
    if positives and query.tokens and positives[0].tokens is None:
        raise DataError(f"{where}: the query is token ids, its passages are text; tokenise both")
    return RawExample(where, query, positives, negatives)


def _plain_passage(item: Any, where: str) -> Passage:
    content, tokens = text_or_tokens(item, where)
    return Passage("", "", content, tokens)


def id_example(record: Record, index: int, where: str) -> RawExample:
    """`query_id, query_text, positive_document_ids, negative_document_ids`.

    The query's text may be under `query` instead, short answers under `answers` or `answer`. Ours,
    and optional: `positive_scores` and `negative_scores`, a teacher's score of each passage.

    Raises:
        DataError: a field is not of its type, or there are not as many scores as passages.
    """
    query = Query(
        optional_identifier(record, ("query_id",), where) or str(index),
        optional_text(record, "query_text", where) or optional_text(record, "query", where),
        texts(record, "answers", where) or texts(record, "answer", where),
    )
    positives = identifiers(record, "positive_document_ids", where)
    negatives = identifiers(record, "negative_document_ids", where)
    return RawExample(
        where,
        query,
        positives,
        negatives,
        _scores(record, "positive_scores", len(positives), where),
        _scores(record, "negative_scores", len(negatives), where),
    )


def _scores(record: Record, field: str, expected: int, where: str) -> list[float]:
    values = listed(record, field, where)
    if values and len(values) != expected:
        raise DataError(
            f"{where}: {len(values)} {field} for {expected} passages; there must be one for each"
        )
    return [number({field: value}, field, where) for value in values]
