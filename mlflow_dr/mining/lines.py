"""The lines that are written: a query, its positives and its negatives under Tevatron's names."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.retrieval.ranking import Found


class NamedPassages:
    """What was found for some queries, with ids looked up for all of them at once."""

    def __init__(self, corpus: Corpus, found: Found, positives: list[np.ndarray]) -> None:
        used = np.unique(np.concatenate([found.rows.ravel(), *positives]))
        used = used[used >= 0]
        ids = corpus.ids.take(used).to_pylist()
        self._ids = dict(zip(used.tolist(), ids, strict=True))
        self._found = found
        self._positives = positives

    def ranked(self, place: int) -> tuple[list[int], list[float]]:
        """Rows and scores of one query's ranking, without its empty places."""
        rows = self._found.rows[place]
        number = int((rows >= 0).sum())
        return rows[:number].tolist(), self._found.scores[place, :number].tolist()

    def positives(self, place: int) -> tuple[list[str], np.ndarray]:
        """Ids and scores of one query's positives."""
        ids = [self._ids[row] for row in self._positives[place].tolist()]
        return ids, self._found.also[place]

    def negatives(self, place: int, chosen: list[int]) -> tuple[list[str], np.ndarray]:
        """Ids and scores at these places of one query's ranking."""
        ids = [self._ids[row] for row in self._found.rows[place, chosen].tolist()]
        return ids, self._found.scores[place, chosen]


def record_of(query: Query, named: NamedPassages, place: int, chosen: list[int]) -> dict[str, Any]:
    """The line of one query.

    Args:
        query: the query.
        named: what was found for it and for others.
        place: which of them it is.
        chosen: places of its negatives in its ranking.
    """
    positive_ids, positive_scores = named.positives(place)
    negative_ids, negative_scores = named.negatives(place, chosen)
    answers = {"answers": list(query.answers)} if query.answers else {}
    return {
        "query_id": query.id,
        "query_text": query.text,
        **answers,
        "positive_document_ids": positive_ids,
        "negative_document_ids": negative_ids,
        "positive_scores": _plain(positive_scores),
        "negative_scores": _plain(negative_scores),
    }


def _plain(scores: np.ndarray) -> list[float]:
    """fp32 scores in the seven digits that they have."""
    return [float(f"{score:.7g}") for score in scores.tolist()]
