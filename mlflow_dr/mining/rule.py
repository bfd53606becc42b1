"""Training queries, and which of the passages that a search found become their negatives.

Sources: the top of BM25 without the answer (Karpukhin et al., Dense Passage Retrieval, EMNLP 2020);
the top of a dense retriever (Xiong et al., ANCE, ICLR 2021); margins below the positive's score
(Moreira et al., NV-Retriever, 2024). Margins and ranges mean what they mean in
sentence-transformers' `mine_hard_negatives`.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.errors import DataError, UsageError

TOP, RANDOM = "top", "random"
SAMPLES = (TOP, RANDOM)

POSITIVE_OR_SAME = "positives or of the same text"
TOO_CLOSE = "too close to the positive's score"
OUT_OF_RANGE = "outside the range of scores"
HOLDS_ANSWER = "holding an answer"


@dataclass(frozen=True)
class Rule:
    """What makes a passage a hard negative.

    Ranks are counted from 0, after the positives are taken out of the ranking.

    Attributes:
        negatives: how many for each query, at most.
        depth: only the ranks below this number are looked at.
        range_min: the first ranks that are skipped.
        sample: `top` takes the highest-ranked candidates, `random` a random sample of them.
        seed: of the random sample; a query's sample depends only on the seed and the query's id.
        margin: a negative scores at least this much less than the positive.
        relative_margin: the same as a share of the positive's score; with 0.05 a negative scores at
            most 95 % of it.
        max_score: a negative scores at most this.
        min_score: a negative scores at least this.

    With several positives, margins are taken from the one of the lowest score.

    Raises:
        UsageError: a value out of range, or values that contradict each other.
    """

    negatives: int = 30
    depth: int = 100
    range_min: int = 0
    sample: str = TOP
    seed: int = 0
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        for name in ("margin", "relative_margin", "max_score", "min_score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} {value}: expected a number")
        if self.negatives < 1 or self.range_min < 0:
            raise UsageError(
                f"negatives {self.negatives} and range_min {self.range_min}: expected at least 1 "
                "and at least 0"
            )
        if self.depth - self.range_min < self.negatives:
            raise UsageError(
                f"{self.negatives} negatives from ranks {self.range_min} to {self.depth}: there "
                f"are {max(0, self.depth - self.range_min)}; search deeper (--depth), skip fewer "
                "ranks (--range-min), or ask for fewer (--negatives)"
            )
        if self.sample not in SAMPLES:
            raise UsageError(f"sample {self.sample!r}: expected {' or '.join(SAMPLES)}")
        if not (self.relative_margin is None or 0 <= self.relative_margin <= 1):
            raise UsageError(f"relative_margin {self.relative_margin}: expected 0 to 1")
        if None not in (self.min_score, self.max_score) and self.min_score > self.max_score:  # type: ignore[operator]
            raise UsageError(f"min_score {self.min_score} is above max_score {self.max_score}")

    def ceiling(self, positive: float) -> float:
        """The highest score of a negative, by the margins from the positive's score."""
        highest = math.inf
        if self.margin is not None:
            highest = positive - self.margin
        if self.relative_margin is not None:
            # not (1 - margin) times: a score below 0 would be raised
            highest = min(highest, positive - abs(positive) * self.relative_margin)
        return highest


def choose(
    rule: Rule,
    query_id: str,
    rows: Sequence[int],
    scores: Sequence[float],
    excluded: Sequence[bool],
    positive: float,
    holds_answer: Callable[[int], bool],
    left_out: Counter[str],
) -> list[int]:
    """The indices of the negatives in a query's ranking, the best first.

    Args:
        rule: what makes a negative.
        query_id: seeds the random sample.
        rows: what the search found, the best first.
        scores: their scores.
        excluded: whether it is a positive, or as good as one.
        positive: the positives' lowest score.
        holds_answer: whether a row holds an answer; asked as late as possible.
        left_out: counts what is left out, by reason.
    """
    others = [index for index, is_excluded in enumerate(excluded) if not is_excluded]
    left_out[POSITIVE_OR_SAME] += len(rows) - len(others)
    ceiling = rule.ceiling(positive)
    highest = math.inf if rule.max_score is None else rule.max_score
    lowest = -math.inf if rule.min_score is None else rule.min_score
    candidates = []
    for index in others[rule.range_min : rule.depth]:
        if scores[index] > ceiling:
            left_out[TOO_CLOSE] += 1
        elif not lowest <= scores[index] <= highest:
            left_out[OUT_OF_RANGE] += 1
        else:
            candidates.append(index)
    if rule.sample == RANDOM:
        # in random order, the first candidates without an answer are a random sample of all such
        random.Random(f"{rule.seed}:{query_id}").shuffle(candidates)
    chosen: list[int] = []
    for index in candidates:
        if len(chosen) == rule.negatives:
            break
        if holds_answer(rows[index]):
            left_out[HOLDS_ANSWER] += 1
        else:
            chosen.append(index)
    return sorted(chosen)


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
