"""The records of a test collection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlflow_dr.files import digest_of

Qrels = Mapping[str, Mapping[str, int]]
"""query id -> passage id -> relevance; a passage is relevant when its relevance is above 0."""


class Passage(NamedTuple):
    """One document of the corpus."""

    id: str
    title: str
    text: str


class Query(NamedTuple):
    """One question put to the corpus."""

    id: str
    text: str


class Example(NamedTuple):
    """One training example: a query, at least one relevant passage, and hard negatives, if any."""

    query: Query
    positives: Sequence[Passage]
    negatives: Sequence[Passage]


class Topics(NamedTuple):
    """The queries of one split and their relevance judgements, each query judged at least once."""

    queries: Sequence[Query]
    qrels: Qrels

    @property
    def digest(self) -> str:
        """Digest of the queries' ids and texts and of their judgements, whatever their order."""
        lines = sorted(
            f"{query.id}\t{query.text}\t{sorted(self.qrels[query.id].items())}"
            for query in self.queries
        )
        return digest_of(*lines)
