"""A subset: passages of a corpus with their origin, and the queries that search them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Topics
from mlflow_dr.files import digest_of
from mlflow_dr.subsets.spec import ALL, SubsetSpec, SubsetTerm
from mlflow_dr.subsets.strategies import SubsetSources

JUDGED = "judged"


@dataclass(frozen=True)
class Subset:
    """The passages and queries of a validation.

    Attributes:
        spec: the request.
        corpus: the whole corpus.
        topics: the queries, and their judgements.
        rows: the passages that are searched, rows of the corpus, ascending, `(n,) int64`.
        origins: which of `names` a passage comes from, as bits, `(n,) int64`.
        candidates: the only rows that each query ranks, `(n_candidates,) int64`; None if each
            query ranks all passages.
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
        """Where passages come from: they are judged, or chosen by a term."""
        terms = (term for term in self.spec.terms if term.strategy.chooses != "queries")
        return (JUDGED, *(term.shown for term in terms))

    @property
    def sizes(self) -> dict[str, int]:
        """How many passages have each origin; a passage may have several."""
        return {name: int((self.origins >> bit & 1).sum()) for bit, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """A digest of passages, queries and candidates, however they were chosen."""
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
            " + ".join(name for bit, name in enumerate(self.names) if bits >> bit & 1)
            for bits in combinations.tolist()
        ]
        origin = pa.DictionaryArray.from_arrays(which.astype(np.int32), pa.array(texts))
        ids = self.corpus.ids.take(pa.array(self.rows)).combine_chunks()
        return pa.table({"passage_id": ids, "origin": origin})


def make_subset(spec: SubsetSpec, sources: SubsetSources) -> Subset:
    """Choose the queries first, then passages for these queries; judged passages are included.

    Raises:
        DataError: a ranking file is malformed, or about another collection.
        UsageError: no such encoder.
    """
    sources = replace(sources, seed=spec.seed)
    queries = spec.term_that_chooses("queries")
    if queries is not None:
        sources = replace(sources, topics=_chosen_topics(queries, sources))
    corpus, topics = sources.corpus, sources.topics
    judged = _judged_rows(spec, corpus, topics)
    choices = [
        (term.strategy.chooses, term.strategy.choose(term, sources))
        for term in spec.terms
        if term is not queries
    ]
    candidates = None
    for chooses, rows in choices:
        if chooses == "candidates":
            candidates = [np.union1d(*pair) for pair in zip(rows, judged, strict=True)]
    joined, origins = _joined([_union(judged), *(_union(rows) for _, rows in choices)])
    return Subset(spec, corpus, topics, joined, origins, candidates)


def _chosen_topics(term: SubsetTerm, sources: SubsetSources) -> Topics:
    topics = sources.topics
    positions = _union(term.strategy.choose(term, sources))
    queries = [topics.queries[position] for position in positions]
    return Topics(queries, {query.id: topics.qrels[query.id] for query in queries})


def _judged_rows(spec: SubsetSpec, corpus: Corpus, topics: Topics) -> list[np.ndarray]:
    """The judged passages of each query that are always included."""
    ids = [
        [pid for pid, rel in topics.qrels[query.id].items() if rel > 0 or spec.judged == ALL]
        for query in topics.queries
    ]
    rows = corpus.rows_of([pid for of_query in ids for pid in of_query])
    return np.split(rows, np.cumsum([len(of_query) for of_query in ids])[:-1])


def _union(groups: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *groups]))


def _joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all parts, ascending, and a bit for each part that a row is in."""
    rows = _union(parts)
    origins = np.zeros(len(rows), np.int64)
    for bit, part in enumerate(parts):
        # a search in tens of millions of rows takes seconds
        places = slice(None) if len(part) == len(rows) else np.searchsorted(rows, part)
        origins[places] |= 1 << bit
    return rows, origins
