"""Estimates on the full corpus's scale, from what a search of a subset has found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mlflow_dr.collection.records import Query
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.dense import SearchRequest
from mlflow_dr.retrieval.estimate import (
    Estimate,
    RelevantPassages,
    Sample,
    check_sample,
    estimate,
    tail_size,
)
from mlflow_dr.retrieval.measures import Measure
from mlflow_dr.retrieval.ranking import SearchResult, without_excluded
from mlflow_dr.subsets.subset import Subset
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.validations import EvalConfig


class SubsetEstimator:
    """Estimates the measures of a validation on the full corpus.

    Args:
        data: is on a subset with a random sample.
        settings: the measures.

    Raises:
        UsageError: the subset has no sample, or one that is too small.
    """

    def __init__(self, data: EvalDataset, settings: EvalConfig) -> None:
        if data.subset is None:
            raise UsageError("the full corpus needs no estimate")
        self._subset: Subset = data.subset
        self._data, self._measures = data, settings.measures
        self._keeps_own_id = data.keeps_own_id(settings)
        self._unseen = len(data.corpus) - len(self._subset)
        check_sample(len(self._subset.sample), self._unseen)
        qrels = data.topics.qrels
        self._gains = [
            [gain for gain in qrels.get(query.id, {}).values() if gain > 0]
            for query in self._queries
        ]
        self._relevant = self._relevant_rows()

    @property
    def _queries(self) -> Sequence[Query]:
        return self._data.topics.queries

    def _relevant_rows(self) -> list[dict[int, int]]:
        """Row and relevance of the relevant passages that can be found, for each query."""
        qrels = self._data.topics.qrels
        judged = [
            (position, passage_id, gain)
            for position, query in enumerate(self._queries)
            for passage_id, gain in qrels.get(query.id, {}).items()
            if gain > 0 and (self._keeps_own_id or passage_id != query.id)
        ]
        # one look-up for all queries, because each goes through all ids of the corpus
        rows = self._data.corpus.rows_of([passage_id for _, passage_id, _ in judged]).tolist()
        relevant: list[dict[int, int]] = [{} for _ in self._queries]
        for (position, _, gain), row in zip(judged, rows, strict=True):
            if row >= 0:
                relevant[position][row] = gain
        return relevant

    def relevant_rows(self) -> list[np.ndarray]:
        """The rows whose scores are needed, of each query."""
        return [np.array(list(rows), np.int64) for rows in self._relevant]

    def request(self) -> SearchRequest:
        """The search for the highest scores of the sample."""
        sample = self._subset.sample
        deepest = max(measure.cutoff for measure in self._measures)
        size = tail_size(deepest, len(sample), self._unseen)
        depth = min(len(sample), 2 * size + 8)  # the jackknife leaves out some of them
        return SearchRequest(self._queries, max(1, depth), sample)

    def estimates(self, found: SearchResult, tails: SearchResult) -> dict[Measure, Estimate]:
        """The measures on the full corpus.

        Args:
            found: the best passages of the subset, with the scores of `relevant_rows`.
            tails: what `request` has found.
        """
        rows, scores = self._without_excluded(tails)
        ranked, _ = self._without_excluded(found)
        is_thinned = len(self._subset.spec.terms) > 1
        sample = Sample(scores, rows, len(self._subset.sample), self._unseen, is_thinned)
        passages = self._passages(ranked, found.extra_scores, scores)
        return estimate(sample, passages, self._gains, self._measures)

    def _without_excluded(self, found: SearchResult) -> tuple[np.ndarray, np.ndarray]:
        ids = self._data.corpus.ids
        return without_excluded(self._queries, ids, found.rows, found.scores, self._keeps_own_id)

    def _passages(
        self, ranked: np.ndarray, extra_scores: Sequence[np.ndarray], tails: np.ndarray
    ) -> RelevantPassages:
        """The relevant passages, those of each query in the order in which they rank."""
        parts: list[tuple[int, float, int, int, int]] = []
        depth = int(ranked.shape[1])
        for query, relevant in enumerate(self._relevant):
            ranks = zip(ranked[query].tolist(), range(depth), strict=True)
            rank_of: defaultdict[int, int] = defaultdict(lambda: depth, ranks)
            scores = extra_scores[query].tolist()
            ordered = sorted(
                (rank_of[row], -float(score), gain)
                for (row, gain), score in zip(relevant.items(), scores, strict=True)
            )
            above = np.searchsorted(-tails[query], [score for _, score, _ in ordered]).tolist()
            parts += [
                (query, -score, seen, int(count), gain)
                for (seen, score, gain), count in zip(ordered, above, strict=True)
            ]
        columns = np.array(parts, np.float64).reshape(-1, 5).T
        query_of, score_of, seen_of, in_sample, gain_of = columns
        return RelevantPassages(
            query_of.astype(np.int64),
            score_of,
            seen_of.astype(np.int64),
            in_sample.astype(np.int64),
            gain_of.astype(np.int64),
        )
