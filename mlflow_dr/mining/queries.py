"""Training queries, their positives, and the passages that must not become negatives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.errors import DataError


class MiningQueries(NamedTuple):
    """Training queries over a corpus.

    Attributes:
        queries: in the order of the examples.
        positives: rows of each query's relevant passages, at least one, `(n_positives,) int64`.
        unknown: how many positives the corpus lacks.
        left_out: how many examples have none that the corpus has, or no text.
    """

    queries: list[Query]
    positives: list[np.ndarray]
    unknown: int
    left_out: int


def mining_queries(examples: Examples, corpus: Corpus) -> MiningQueries:
    """The queries of training examples, with their positives as rows of the corpus.

    Raises:
        DataError: none of them can be mined for.
    """
    rows_in_corpus = _rows_in_corpus(examples.passages, corpus)
    queries, positives = [], []
    unknown = left_out = 0
    for index in range(len(examples)):
        example = examples[index]
        rows = example.positives if rows_in_corpus is None else rows_in_corpus[example.positives]
        present = rows[rows >= 0]
        unknown += len(rows) - len(present)
        if len(present) and (example.query.text.strip() or example.query.tokens):
            queries.append(example.query)
            positives.append(present)
        else:
            left_out += 1
    if not queries:
        raise DataError(
            f"none of {len(examples)} training examples can be mined for: the corpus has none of "
            "their positives, or they have no text; check that examples and corpus belong together"
        )
    return MiningQueries(queries, positives, unknown, left_out)


def _rows_in_corpus(passages: Corpus, corpus: Corpus) -> np.ndarray | None:
    """Each passage's row in the corpus, -1 where it has none; None where the two are the same."""
    if passages is corpus or passages.digest == corpus.digest:
        return None
    return corpus.rows_of(passages.ids.to_pylist())


class ExcludedPassages:
    """Passages that never become negatives of a query.

    Those are its positives and what is judged relevant, also of other queries with the same id or
    text; passages with the text of one of them; and the passage that has the query's own id.

    Args:
        queries: all training queries.
        corpus: the corpus of their positives.
        judged: further queries and their relevant passages, as rows of the corpus.
    """

    def __init__(self, queries: MiningQueries, corpus: Corpus, judged: Iterable[Example]) -> None:
        self._texts = np.fromiter(_text_hashes(corpus), np.int64, len(corpus))
        own = corpus.rows_of([query.id for query in queries.queries])
        self._own = own.tolist()
        self._queries = queries.queries
        self._by_name: dict[tuple[str, str], set[int]] = defaultdict(set)
        for query, rows in zip(queries.queries, queries.positives, strict=True):
            self._add(query, rows)
        for example in judged:
            self._add(example.query, example.positives)

    def _add(self, query: Query, rows: np.ndarray) -> None:
        texts = self._texts[rows].tolist()
        for name in _names(query):
            self._by_name[name].update(texts)

    def mask(self, index: int, rows: Sequence[int]) -> list[bool]:
        """Whether each of the rows is excluded for the query of this index."""
        texts = set().union(*(self._by_name[name] for name in _names(self._queries[index])))
        own = self._own[index]
        row_texts = self._texts[np.asarray(rows, np.int64)].tolist()
        return [row == own or text in texts for row, text in zip(rows, row_texts, strict=True)]


def _names(query: Query) -> Iterator[tuple[str, str]]:
    yield "id", query.id
    if query.text:
        yield "text", query.text.strip()


def _text_hashes(corpus: Corpus) -> Iterator[int]:
    """A 64-bit hash of each passage's text, of its title where it has no text."""
    for batch in corpus.batches():
        for passage in batch:
            yield hash(_text(passage))


def _text(passage: Passage) -> str | tuple[int, ...]:
    if passage.tokens is not None:
        return tuple(passage.tokens)
    return passage.text.strip() or passage.title.strip()
