"""A subset: passages of a corpus with their origin, and the queries that are put to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.files import digest_of
from mlflow_dr.retrieval.ranking import read_ranking
from mlflow_dr.subsets.spec import ALL, BM25, ENCODER, QUERIES, RANDOM, SubsetSpec, SubsetTerm

JUDGED = "judged"


class Searching(Protocol):
    """Searches a corpus itself, where a subset is not read from files."""

    def top_passages(self, part: SubsetTerm, queries: Sequence[Query]) -> list[np.ndarray]:
        """The best passages of each query, by BM25 or an encoder: rows, `(<= k,) int64`."""


@dataclass(frozen=True)
class Subset:
    """What a validation searches, and what for.

    Attributes:
        spec: as it was asked for.
        corpus: the whole corpus.
        topics: the queries that are put, and their judgements.
        rows: the passages that are searched, rows of the corpus, ascending, `(n,) int64`.
        origins: which of `names` a passage comes from, a bit for each, `(n,) int64`.
        candidates: for each query the only rows that it ranks; None for no such limit.
    """

    spec: SubsetSpec
    corpus: Corpus
    topics: Topics
    rows: np.ndarray
    origins: np.ndarray
    candidates: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Where passages come from: judged, or a part of the spec."""
        parts = (part.shown for part in self.spec.terms if part.kind != QUERIES)
        return (JUDGED, *parts)

    @property
    def sizes(self) -> dict[str, int]:
        """How many passages come from where; one may come from several places."""
        return {name: int((self.origins >> bit & 1).sum()) for bit, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """Of passages, queries and candidates; equal for equal ones, however they were chosen."""
        ids = sorted(self.corpus.ids.take(pa.array(self.rows)).to_pylist())
        parts = ["\n".join(ids), "\n".join(sorted(query.id for query in self.topics.queries))]
        if self.candidates is not None:
            for query, rows in zip(self.topics.queries, self.candidates, strict=True):
                named = sorted(self.corpus.ids.take(pa.array(rows)).to_pylist())
                parts.append("\n".join([query.id, *named]))
        return digest_of(*parts)

    def table(self) -> pa.Table:
        """Ids of the passages, and where they come from: columns `passage_id` and `origin`."""
        combinations, which = np.unique(self.origins, return_inverse=True)
        texts = [
            " + ".join(name for bit, name in enumerate(self.names) if one >> bit & 1)
            for one in combinations.tolist()
        ]
        origin = pa.DictionaryArray.from_arrays(which.astype(np.int32), pa.array(texts))
        ids = self.corpus.ids.take(pa.array(self.rows)).combine_chunks()
        return pa.table({"passage_id": ids, "origin": origin})


def make_subset(spec: SubsetSpec, corpus: Corpus, topics: Topics, searching: Searching) -> Subset:
    """Choose the passages.

    The queries are drawn first: tops are those of the queries that are put. What is drawn by lot
    depends on the ids and the seed, never on the order of the corpus, and a smaller draw is part of
    a larger one.

    Args:
        spec: what was asked for.
        corpus: whose passages.
        topics: queries and judgements; judged passages are always in.
        searching: finds tops where they are not read from files.

    Raises:
        DataError: a ranking file is malformed, or about another collection.
        UsageError: no such encoder.
    """
    topics = _drawn_topics(spec, topics)
    judged = _judged_rows(spec, corpus, topics)
    wanted = spec.candidates
    if wanted is not None:
        tops = _tops(wanted, corpus, topics, searching)
        candidates = [np.union1d(top, own) for top, own in zip(tops, judged, strict=True)]
        rows, origins = _joined([_union(judged), _union(tops)])
        return Subset(spec, corpus, topics, rows, origins, candidates)
    if spec.is_full:
        rows = np.arange(len(corpus))
        origins = np.full(len(rows), 2, np.int64)
        origins[_union(judged)] |= 1
        return Subset(spec, corpus, topics, rows, origins)
    parts = [
        _drawn(corpus, part.count, spec.seed)
        if part.kind == RANDOM
        else _union(_tops(part, corpus, topics, searching))
        for part in spec.terms
        if part.kind != QUERIES
    ]
    rows, origins = _joined([_union(judged), *parts])
    return Subset(spec, corpus, topics, rows, origins)


def _drawn_topics(spec: SubsetSpec, topics: Topics) -> Topics:
    if spec.n_queries is None or spec.n_queries >= len(topics.queries):
        return topics
    by_id = sorted(range(len(topics.queries)), key=lambda place: topics.queries[place].id)
    order = np.random.default_rng(spec.seed).permutation(len(by_id))[: spec.n_queries]
    queries = [topics.queries[place] for place in sorted(by_id[one] for one in order)]
    return Topics(queries, {query.id: topics.qrels[query.id] for query in queries})


def _drawn(corpus: Corpus, count: int, seed: int) -> np.ndarray:
    """Rows drawn by lot from those in the order of their ids."""
    by_id = np.argsort(corpus.tie_ranks())
    return by_id[np.random.default_rng(seed).permutation(len(by_id))[:count]]


def _judged_rows(spec: SubsetSpec, corpus: Corpus, topics: Topics) -> list[np.ndarray]:
    """The judged passages of each query that are always in."""
    of_queries = [
        [pid for pid, rel in topics.qrels[query.id].items() if rel > 0 or spec.judged == ALL]
        for query in topics.queries
    ]
    rows = corpus.rows_of([pid for ids in of_queries for pid in ids])
    return np.split(rows, np.cumsum([len(ids) for ids in of_queries])[:-1])


def _tops(
    part: SubsetTerm, corpus: Corpus, topics: Topics, searching: Searching
) -> list[np.ndarray]:
    """The best passages of each query."""
    if part.kind in (BM25, ENCODER):
        return searching.top_passages(part, topics.queries)
    of_files = [read_ranking(Path(name), part.count, topics.queries, corpus) for name in part.names]
    return [np.unique(np.concatenate(of_query)) for of_query in zip(*of_files, strict=True)]


def _union(groups: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *groups]))


def _joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all parts, ascending, and a bit for each part that a row is in."""
    rows = _union(parts)
    origins = np.zeros(len(rows), np.int64)
    for bit, part in enumerate(parts):
        origins[np.searchsorted(rows, part)] |= 1 << bit
    return rows, origins
