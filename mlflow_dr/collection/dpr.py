"""DPR's training examples: a JSON array of questions with their passages.

Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

from mlflow_dr.collection.examples import RawExample
from mlflow_dr.collection.jsonl import (
    Record,
    listed,
    optional_identifier,
    optional_text,
    text,
    texts,
)
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, quoted

PASSAGE_IDS = ("passage_id", "psg_id", "id")


def dpr_example(record: Record, index: int, where: str, others: bool = False) -> RawExample:
    """`question, answers, positive_ctxs, negative_ctxs, hard_negative_ctxs`.

    The hard negatives are the negatives; where a question has none, its `negative_ctxs` are, which
    is DPR's own fallback. A passage is `title, text` and `passage_id` or `psg_id`; its `score` is
    the retriever's that found it, no teacher's, and is not read. Questions have no ids in this
    format: the record's index in the file is taken.

    Raises:
        DataError: a field is not of its type, or a passage has no text.
    """
    query = Query(
        optional_identifier(record, ("query_id", "question_id"), where) or str(index),
        optional_text(record, "question", where),
        texts(record, "answers", where),
    )
    positives = _passages(record, "positive_ctxs", where)
    hard = _passages(record, "hard_negative_ctxs", where)
    rest = _passages(record, "negative_ctxs", where) if others or not hard else []
    return RawExample(where, query, positives, hard or rest, others=rest if others else ())


def dpr_example_with_others(record: Record, index: int, where: str) -> RawExample:
    """The same, where `negative_ctxs` are the others besides."""
    return dpr_example(record, index, where, others=True)


def _passages(record: Record, field: str, where: str) -> list[Passage]:
    passages: list[Passage] = []
    for index, item in enumerate(listed(record, field, where)):
        place = f"{where}: {field}[{index}]"
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected title, text and passage_id, got {quoted(item)}")
        passage_id = optional_identifier(item, PASSAGE_IDS, place)
        title = optional_text(item, "title", place)
        passages.append(Passage(passage_id, title, text(item, "text", place)))
    return passages
