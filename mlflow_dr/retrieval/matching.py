"""Which of the passages that were found hold an answer, here or in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import current_process, get_context
from types import TracebackType

import numpy as np

from mlflow_dr.background import main_module_hidden
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.files import usable_cores
from mlflow_dr.retrieval.answers import REGEX, STRING, AnswerFinder, warn_of_faults

SECONDS_PER_PASSAGE = 1e-4
SECONDS_PER_PAIR = 1e-6
SECONDS_PER_EXPRESSION = 3e-5
"""Of a passage's tokens, of an answer in a passage, and of a regular expression in a passage."""

SECONDS_WORTH_PROCESSES = 5.0
"""Starting processes takes about a second."""


class AnswerMatcher:
    """Finds answers in passages by row; a passage's tokens are made once and kept.

    Much work is shared among new processes. Each passage belongs to one of them, so that its
    tokens are still made once.

    Args:
        corpus: the passages.
        match: how answers are matched; see `AnswerFinder`.
        processes: how many to use, if any are worth it; one for each core when None.
    """

    def __init__(self, corpus: Corpus, match: str = STRING, processes: int | None = None) -> None:
        self._corpus = corpus
        self._match = match
        self._finder = AnswerFinder(corpus, match=match)
        self._processes = usable_cores() if processes is None else processes
        self._pools: list[ProcessPoolExecutor] = []
        self._has_warned = False

    def __enter__(self) -> AnswerMatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def prepare(self, queries: int, depth: int) -> None:
        """Start processes, if they are worth it, that are ready when the search has ended."""
        passages = min(len(self._corpus), queries * depth)
        pair = SECONDS_PER_EXPRESSION if self._match == REGEX else SECONDS_PER_PAIR
        seconds = passages * SECONDS_PER_PASSAGE + queries * depth * pair
        if (
            seconds < SECONDS_WORTH_PROCESSES
            or self._processes < 2
            or self._corpus.directory is None  # a process would be sent all passages
            or current_process().daemon  # daemons cannot start processes
        ):
            return
        while len(self._pools) < self._processes:
            pool = ProcessPoolExecutor(1, get_context("spawn"), _open, (self._corpus, self._match))
            self._pools.append(pool)
            with main_module_hidden():
                pool.submit(len, ())

    def hits(self, queries: Sequence[Query], rows: np.ndarray) -> np.ndarray:
        """Whether each passage that was found for a query holds one of its answers.

        Args:
            queries: the queries.
            rows: rows of passages, `(n_queries, depth) int64`; -1 where there is none.

        Returns:
            `(n_queries, depth) bool`.

        Raises:
            DataError: the search for a regular expression takes too long.
        """
        if not self._has_warned:
            self._has_warned = True
            warn_of_faults(self._finder, queries)
        self.prepare(*rows.shape)
        answers = [query.answers for query in queries]
        owners, passages = np.nonzero(rows >= 0)
        pairs = np.stack([owners, rows[owners, passages]])
        hits = np.zeros(rows.shape, bool)
        if not self._pools:
            hits[owners, passages] = matches(self._finder, answers, pairs)
            return hits
        shares = [np.flatnonzero(pairs[1] % len(self._pools) == n) for n in range(len(self._pools))]
        futures: list[Future[np.ndarray]] = []
        for pool, share in zip(self._pools, shares, strict=True):
            with main_module_hidden():
                futures.append(pool.submit(_matches_here, answers, pairs[:, share]))
        for share, future in zip(shares, futures, strict=True):
            hits[owners[share], passages[share]] = future.result()
        return hits

    def close(self) -> None:
        """End the processes."""
        while self._pools:
            self._pools.pop().shutdown(cancel_futures=True)


def matches(
    finder: AnswerFinder, answers: Sequence[Sequence[str]], pairs: np.ndarray
) -> np.ndarray:
    """Whether passages hold answers, `(n_pairs,) bool`.

    Args:
        finder: has the passages.
        answers: of each query.
        pairs: index of a query and row of a passage, `(2, n_pairs) int64`.
    """
    sought = [finder.sought(some) for some in answers]
    found = np.zeros(pairs.shape[1], bool)
    # by passage, so that each is looked up once
    order = np.argsort(pairs[1], kind="stable")
    queries, rows = pairs[:, order].tolist()
    found[order] = [
        finder.holds(row, sought[query]) for query, row in zip(queries, rows, strict=True)
    ]
    return found


_finder: AnswerFinder | None = None
"""In a process that a matcher has started."""


def _open(corpus: Corpus, match: str) -> None:
    global _finder
    _finder = AnswerFinder(corpus, match=match)


def _matches_here(answers: Sequence[Sequence[str]], pairs: np.ndarray) -> np.ndarray:
    assert _finder is not None
    return matches(_finder, answers, pairs)
