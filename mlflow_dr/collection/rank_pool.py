"""Questions and their passages as one pool: what average rank and NLL are measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError

log = logging.getLogger(__name__)


class RankPool(NamedTuple):
    """Questions, and rows of their passages.

    Attributes:
        queries: each with an id of its own.
        corpus: the passages, each title and text once.
        positives: the first positive of each question, `(n_queries,) int64`.
        negatives: hard negatives of each question, in the file's order, `(n,) int64`.
        others: of each question, the rows of negatives that are not hard.
    """

    queries: Sequence[Query]
    corpus: Corpus
    positives: np.ndarray
    negatives: Sequence[np.ndarray]
    others: Sequence[np.ndarray]

    def own_rows(self, index: int, most: int) -> np.ndarray:
        """A question's positive, and at most so many of its hard and of its other negatives."""
        parts = (self.negatives[index][:most], self.others[index][:most])
        return np.concatenate([self.positives[index : index + 1], *parts])

    def rows(self, most: int) -> np.ndarray:
        """The rows of all questions' passages, ascending, `(n,) int64`; see `own_rows`."""
        rows = [self.own_rows(index, most) for index in range(len(self.queries))]
        return np.unique(np.concatenate(rows))


def rank_pool(name: str, examples: Iterable[RawExample]) -> RankPool:
    """The pool of training examples, whose passages are texts; a warning counts those left out.

    Raises:
        DataError: no example has a question and a positive.
    """
    passages: dict[tuple[str, str], int] = {}

    def rows(some: Sequence[Passage | str]) -> np.ndarray:
        keys = [(p.title, p.text) for p in some if isinstance(p, Passage)]
        return np.array([passages.setdefault(key, len(passages)) for key in keys], np.int64)

    queries: dict[str, Query] = {}
    positives: list[int] = []
    negatives: list[np.ndarray] = []
    others: list[np.ndarray] = []
    left_out = 0
    for number, raw in enumerate(examples):
        query = raw.query
        if not raw.positives or not query.text.strip():
            left_out += 1
            continue
        name_of = query.id if query.id not in queries else f"{query.id}#{number}"
        queries[name_of] = query._replace(id=name_of)
        positives.append(int(rows(raw.positives[:1])[0]))
        negatives.append(rows(raw.negatives))
        others.append(rows(raw.others))
    if not queries:
        raise DataError(f"{name}: no example has a question and a positive passage")
    if left_out:
        log.warning("%s: left out: %d examples without question or positive", name, left_out)
    titles, texts = zip(*passages, strict=True)
    ids = [str(number) for number in range(len(passages))]
    table = pa.table({"id": ids, "title": titles, "text": texts}, schema=SCHEMA)
    return RankPool(list(queries.values()), Corpus(table), np.array(positives), negatives, others)
