"""The records of a test collection."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import digest_of

Qrels = Mapping[str, Mapping[str, int]]
"""query id -> passage id -> relevance; a passage is relevant when its relevance is above 0."""


class Passage(NamedTuple):
    """One document of the corpus.

    A source that is tokenised already has `tokens`, ids without special tokens, and no text.
    """

    id: str
    title: str
    text: str
    tokens: Sequence[int] | None = None


class Query(NamedTuple):
    """One question put to the corpus, with its short answers where the collection has them.

    A source that is tokenised already has `tokens`, ids without special tokens, and no text.
    `excluded` are ids of passages that the collection leaves out of this query's ranking.
    """

    id: str
    text: str
    answers: Sequence[str] = ()
    tokens: Sequence[int] | None = None
    excluded: Sequence[str] = ()


class Example(NamedTuple):
    """One training example; passages are rows of the corpus that `Examples.passages` is.

    Attributes:
        query: the question.
        positives: rows of relevant passages, at least one, `(n_positives,) int64`.
        negatives: rows of hard negatives, `(n_negatives,) int64`.
        scores: a teacher's scores of the positives, then of the negatives, where the source has
            them, `(n_positives + n_negatives,) float32`.
    """

    query: Query
    positives: np.ndarray
    negatives: np.ndarray
    scores: np.ndarray | None = None


class Topics(NamedTuple):
    """The queries of one split, and what says which passages are right.

    Each query is judged at least once; or there are no judgements at all, and a passage is right
    that holds one of the query's answers.
    """

    queries: Sequence[Query]
    qrels: Qrels

    @property
    def digest(self) -> str:
        """Digest of the queries' ids, texts, tokens and judgements, whatever their order."""
        lines = sorted(
            f"{query.id}\t{query.text}\t{sorted(self.qrels.get(query.id, {}).items())}"
            + ("" if query.tokens is None else f"\t{list(query.tokens)}")
            + (f"\texcluded {sorted(query.excluded)}" if query.excluded else "")
            for query in self.queries
        )
        return digest_of(*lines)

    def of(self, queries: Sequence[Query]) -> Topics:
        """Some of the queries, with their judgements."""
        qrels = {query.id: self.qrels[query.id] for query in queries if query.id in self.qrels}
        return Topics(queries, qrels)

    @property
    def answers_digest(self) -> str:
        """Digest of the queries' ids and answers, whatever their order."""
        return digest_of(*sorted(f"{query.id}\t{list(query.answers)}" for query in self.queries))


R = TypeVar("R", Passage, Query)


def unique(kind: str, read: Callable[[], Iterable[tuple[str, R]]]) -> Iterator[R]:
    """All records of a source, and at the end a check that no id is used twice.

    Args:
        kind: what the records are, for messages.
        read: yields the records with their locations; called again to find the two.

    Raises:
        DataError: an id is used twice, with both locations.
    """
    hashes = array("q")  # 8 bytes for each id; the ids themselves would need ten times as much
    for _, record in read():
        hashes.append(hash(record.id))
        yield record
    in_order = np.sort(np.frombuffer(hashes, np.int64))
    suspects = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    first_uses: dict[str, str] = {}
    for location, record in read() if suspects else ():
        if hash(record.id) not in suspects:
            continue
        if (first := first_uses.get(record.id)) is not None:
            also = f"; its first use is at {first}" if first != location else ""
            raise DataError(f"{location}: {kind} id {quoted(record.id)} is used twice{also}")
        first_uses[record.id] = location
