"""Tevatron's current training examples: passages by id, to be looked up in a corpus beside them.

Layout: Ma et al., Tevatron 2.0: Unified Document Retrieval Toolkit across Scale, Language, and
Modality, 2025. `mlflow-dr mine` writes it too.
"""

from __future__ import annotations

from mlflow_dr.collection.drafts import RawExample
from mlflow_dr.collection.fields import (
    identifiers,
    listed,
    number,
    optional_identifier,
    optional_text,
    texts,
)
from mlflow_dr.collection.recordfiles import Record
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError


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
