"""Training examples from what ir_datasets calls docpairs and scoreddocs."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow_dr.collection.drafts import RawExample
from mlflow_dr.collection.irds_reading import reading
from mlflow_dr.collection.records import Query, Topics

RELEVANT = 1


def pair_examples(dataset: Any, queries: Mapping[str, Query], name: str) -> Iterator[RawExample]:
    """One example for each query of the docpairs: first passages against second passages.

    The pairs come in any order, so all are held until the last one is read, four bytes for each.

    Args:
        dataset: an ir_datasets dataset with docpairs.
        queries: the queries by id.
        name: what the user calls it, for messages.

    Raises:
        DataError: the pairs cannot be downloaded or read.
    """
    groups = _Groups()
    with reading(f"{name}: the docpairs"):
        for pair in dataset.docpairs_iter():
            groups.add(pair.query_id, pair.doc_id_a, pair.doc_id_b)
    for query_id, positives, negatives in groups:
        query = queries.get(query_id) or Query(query_id, "")
        yield RawExample(f"{name}: query {query_id!r}", query, positives, negatives)


def candidate_examples(dataset: Any, topics: Topics, name: str) -> Iterator[RawExample]:
    """One example for each judged query: its relevant passages against its other scoreddocs.

    Args:
        dataset: an ir_datasets dataset with scoreddocs.
        topics: the judged queries.
        name: what the user calls it, for messages.

    Raises:
        DataError: the scoreddocs cannot be downloaded or read.
    """
    groups = _Groups()
    with reading(f"{name}: the scoreddocs"):
        for scored in dataset.scoreddocs_iter():
            judged = topics.qrels.get(scored.query_id)
            if judged is not None and judged.get(scored.doc_id, 0) < RELEVANT:
                groups.add(scored.query_id, None, scored.doc_id)
    candidates = {query_id: negatives for query_id, _, negatives in groups}
    for query in topics.queries:
        judged = topics.qrels[query.id]
        positives = [passage_id for passage_id, rel in judged.items() if rel >= RELEVANT]
        where = f"{name}: query {query.id!r}"
        yield RawExample(where, query, positives, candidates.get(query.id, []))


class _Groups:
    """Passages by query, each passage's id held once."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._queries: dict[str, tuple[dict[int, None], array[int]]] = {}

    def add(self, query_id: str, positive: str | None, negative: str) -> None:
        if (group := self._queries.get(query_id)) is None:
            group = self._queries[query_id] = ({}, array("i"))
        if positive is not None:
            group[0][self._code(positive)] = None
        group[1].append(self._code(negative))

    def __iter__(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Query, positives and negatives, each passage once; in the order they came in."""
        ids = list(self._codes)
        for query_id, (positives, negatives) in self._queries.items():
            yield (
                query_id,
                [ids[code] for code in positives],
                [ids[code] for code in dict.fromkeys(negatives)],
            )

    def _code(self, passage_id: str) -> int:
        return self._codes.setdefault(passage_id, len(self._codes))
