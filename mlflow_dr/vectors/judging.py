"""Rankings of a search, measured by judgements and answers, and as results in DPR's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.collection.results import Result, ResultPassage
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.retrieval.matching import AnswerMatcher
from mlflow_dr.retrieval.measures import Measure, answers_depth, mean_values, measure_topics
from mlflow_dr.retrieval.ranking import Ranking


class RankingPart(NamedTuple):
    """The ranking of some queries, and the same passages as rows of the corpus.

    Attributes:
        rows: `(n_queries, <= depth) int64`, in the order of `ranking`; -1 where there is none.
    """

    ranking: Ranking
    rows: np.ndarray


class Judge:
    """Measures the parts of a ranking, and keeps the values.

    Args:
        corpus: the passages.
        topics: the queries, of which a ranking may have only some, and others.
        measures: what is measured.
        match: when a passage holds an answer.
        marks_answers: whether it is asked of all passages, as results need it.
    """

    def __init__(
        self,
        corpus: Corpus,
        topics: Topics,
        measures: Sequence[Measure],
        match: str,
        marks_answers: bool = False,
    ) -> None:
        self._corpus = corpus
        self._topics = topics
        self._measures = measures
        self._marks_answers = marks_answers
        self._by_id = {query.id: query for query in topics.queries}
        self._matcher = AnswerMatcher(corpus, match)
        self._values: dict[str, Mapping[Measure, float]] = {}

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._matcher.close()

    @property
    def needs_rows(self) -> bool:
        """Whether parts need rows."""
        return self._marks_answers or answers_depth(self._measures) > 0

    def prepare(self, queries: int, depth: int) -> None:
        """Start processes while the search goes on, if they are worth it."""
        if self.needs_rows:
            looked_at = depth if self._marks_answers else answers_depth(self._measures)
            self._matcher.prepare(queries, looked_at)

    def with_corpus_rows(self, part: RankingPart, ids: pa.ChunkedArray) -> RankingPart:
        """A part whose rows are of vectors, with rows of the corpus; see `corpus_rows`."""
        return part._replace(rows=corpus_rows(self._corpus, ids, part.rows))

    def measure(self, part: RankingPart) -> None:
        """Keep the values of a part."""
        self._measure(part, self._hits(part) if self.needs_rows else None)

    def _hits(self, part: RankingPart) -> np.ndarray:
        """Which passages hold an answer, `(n_queries, <= depth) bool`."""
        depth = part.rows.shape[1] if self._marks_answers else answers_depth(self._measures)
        return self._matcher.hits(self._queries(part), part.rows[:, :depth])

    def _queries(self, part: RankingPart) -> list[Query]:
        return [self._by_id.get(name) or Query(name, "") for name in part.ranking]

    def _measure(self, part: RankingPart, hits: np.ndarray | None) -> None:
        queries = self._queries(part)
        known = [index for index, query in enumerate(queries) if query.id in self._by_id]
        self._values |= measure_topics(
            self._topics.of([queries[index] for index in known]),
            part.ranking,
            self._measures,
            None if hits is None else hits[known],
        )

    def results(self, part: RankingPart) -> Iterator[Result]:
        """The results of a part, which is also measured.

        Raises:
            DataError: a query is none of the collection's.
        """
        hits = self._hits(part)
        self._measure(part, hits)
        for (name, ranked), rows, held in zip(
            part.ranking.items(), part.rows, hits.tolist(), strict=True
        ):
            if name not in self._by_id:
                raise DataError(f"query {quoted(name)} is not in the collection; name its own")
            query = self._by_id[name]
            passages = self._corpus.passages(rows[: len(ranked)])
            found = [
                ResultPassage(passage.id, passage.text, passage.title, score, has_answer)
                for passage, (_, score), has_answer in zip(passages, ranked, held, strict=False)
            ]
            yield Result(query.text, found, list(query.answers))

    def means(self) -> dict[Measure, float]:
        """The means over all queries of the split; those without a ranking count as 0."""
        rest = [query for query in self._topics.queries if query.id not in self._values]
        nothing = np.zeros((len(rest), 1), bool)
        others = measure_topics(self._topics.of(rest), {}, self._measures, nothing)
        return mean_values({**self._values, **others})


def corpus_rows(corpus: Corpus, ids: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Rows of a corpus for rows of vectors, whose order may be another one.

    Args:
        corpus: the passages.
        ids: of the vectors.
        rows: of the vectors; -1 where there is none.

    Raises:
        DataError: the corpus lacks a passage that was found.
    """
    used = np.unique(rows[rows >= 0])
    names = ids.take(pa.array(used))
    if not len(used) or (
        used[-1] < len(corpus) and corpus.ids.take(pa.array(used)).to_pylist() == names.to_pylist()
    ):
        return rows
    found = corpus.rows_of(names.to_pylist())
    if (found < 0).any():
        lacking = names[int(np.flatnonzero(found < 0)[0])].as_py()
        raise DataError(
            f"passage {quoted(lacking)} is not in the collection; the vectors are of another one"
        )
    replaced = found[np.searchsorted(used, np.maximum(rows, used[0]))]
    return np.where(rows >= 0, replaced, -1)


def ranking_rows(corpus: Corpus, ranking: Ranking) -> np.ndarray:
    """Rows of a corpus for a ranking, `(n_queries, depth) int64`; -1 where there is none.

    Raises:
        DataError: the corpus lacks a passage.
    """
    names = sorted({name for ranked in ranking.values() for name, _ in ranked})
    found = dict(zip(names, corpus.rows_of(names).tolist(), strict=True))
    if lacking := [name for name, row in found.items() if row < 0]:
        raise DataError(
            f"passage {quoted(lacking[0])} is not in the collection; the ranking is of another one"
        )
    depth = max((len(ranked) for ranked in ranking.values()), default=0)
    rows = np.full((len(ranking), depth), -1, np.int64)
    for index, ranked in enumerate(ranking.values()):
        rows[index, : len(ranked)] = [found[name] for name, _ in ranked]
    return rows
