"""BM25: term matching over a corpus, by an index that is made once and mapped from disk.

Formula: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009, in
Lucene's variant (Kamphuis et al., Which BM25 Do You Mean?, ECIR 2020), with Anserini's k1 = 0.9
and b = 0.4. The index is bm25s' (Lù, BM25S: Orders of Magnitude Faster Lexical Search via Eager
Sparse Scoring, 2024), which stores each term's score in each passage.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_dr.cache import about_entry, cache_entry
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, MissingExtraError, UsageError
from mlflow_dr.files import digest_of
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.ranking import SearchResult

LAYOUT = 1
"""Raise it when terms or scores change: indexes of the old rules are then not used."""

log = logging.getLogger(__name__)

WORDS = (
    "BM25 needs text with words set apart by blanks, unlike Chinese, Japanese or Thai; an encoder "
    "does not (--subset encoder:NAME@K, mine --with NAME)"
)
QUERIES_PER_BATCH = 1024
NO_LANGUAGE = "none"
WORD = re.compile(r"\w\w+")


@dataclass(frozen=True)
class Bm25Settings:
    """How terms are made and weighted.

    Attributes:
        k1: how slowly repeats of a term stop counting, from 0.
        b: how much long passages are penalised, from 0 to 1.
        language: whose stop words and stemmer (Snowball's) make the terms; `none` for neither.

    Raises:
        UsageError: a value out of range.
    """

    k1: float = 0.9
    b: float = 0.4
    language: str = "english"

    def __post_init__(self) -> None:
        if not 0 <= self.k1 < float("inf"):
            raise UsageError(f"k1 {self.k1}: expected a number from 0 upward, such as 0.9")
        if not 0 <= self.b <= 1:
            raise UsageError(f"b {self.b}: expected a number from 0 to 1, such as 0.4")


class Terms:
    """Text to terms: words of two letters or more in lower case, without stop words, stemmed.

    Args:
        language: one of Snowball's, such as `english`, or `none`.

    Raises:
        UsageError: Snowball has no such language.
        MissingExtraError: PyStemmer or bm25s is not installed.
    """

    def __init__(self, language: str) -> None:
        self._stem = _stemmer(language)
        self._terms = dict.fromkeys(_stop_words(language), "")

    def __call__(self, text: str) -> list[str]:
        """The terms of a text, in order, repeats included."""
        words = WORD.findall(unicodedata.normalize("NFC", text).lower())
        return [term for word in words if (term := self._term(word))]

    def _term(self, word: str) -> str:
        term = self._terms.get(word)
        if term is None:
            term = self._terms[word] = self._stem.stemWord(word) if self._stem else word
        return term


class Bm25:
    """Ranks the passages of a corpus for queries.

    Args:
        index: a bm25s index over the corpus' rows.
        terms: makes the terms, as it made those of the index.
        tie_ranks: each passage's rank among equal scores, `(n_passages,) int64`.
    """

    def __init__(self, index: Any, terms: Terms, tie_ranks: np.ndarray) -> None:
        self._index = index
        self._terms = terms
        self._ranks = tie_ranks

    def search(
        self, queries: Sequence[Query], k: int, extra_rows: Sequence[np.ndarray] = ()
    ) -> SearchResult:
        """The best k passages of each query; a passage without any term of it is never found.

        Args:
            queries: the queries.
            k: passages for each query; no more than the corpus has are found.
            extra_rows: for each query the rows to score whatever their rank; nothing, or one
                array for each query.

        Raises:
            DataError: a query is token ids instead of text.
        """
        width = min(k, len(self._ranks))
        rows = np.full((len(queries), width), -1, np.int64)
        best = np.full((len(queries), width), -np.inf, np.float32)
        extra_scores: list[np.ndarray] = []
        for index, query in enumerate(queries):
            scores = self._scores(query)
            top = _best(scores, width, self._ranks)
            rows[index, : len(top)] = top
            best[index, : len(top)] = scores[top]
            if extra_rows:
                extra_scores.append(scores[extra_rows[index]])
        return SearchResult(rows, best, extra_scores)

    def _scores(self, query: Query) -> np.ndarray:
        if query.tokens is not None:
            raise DataError(f"query {query.id!r} is tokenised already; BM25 needs its text")
        vocabulary = self._index.vocab_dict
        ids = [vocabulary[term] for term in self._terms(query.text) if term in vocabulary]
        scores: np.ndarray = self._index.get_scores_from_ids(ids)
        return scores


class Bm25Retriever:
    """Searches by BM25."""

    def __init__(self, settings: Bm25Settings | None = None) -> None:
        self._settings = settings

    def search(
        self,
        corpus: Corpus,
        queries: Sequence[Query],
        k: int,
        extra_rows: Sequence[np.ndarray] = (),
    ) -> Iterator[SearchResult]:
        """See `Retriever`."""
        index = bm25_index(corpus, self._settings)
        with progress_bar(len(queries), "searching by BM25", "queries") as bar:
            for start in range(0, len(queries), QUERIES_PER_BATCH):
                some = slice(start, start + QUERIES_PER_BATCH)
                yield index.search(queries[some], k, extra_rows[some])
                bar.update(len(queries[some]))


def bm25_index(corpus: Corpus, settings: Bm25Settings | None = None) -> Bm25:
    """The BM25 index of a corpus (title and text), from the user's cache or made now and kept.

    Raises:
        UsageError: no such language.
        DataError: the corpus is token ids instead of text, or has no term at all.
        MissingExtraError: bm25s or PyStemmer is not installed.
    """
    settings = settings or Bm25Settings()
    if corpus.tokenised:
        raise DataError("the corpus is tokenised already; BM25 needs its text")
    terms = Terms(settings.language)
    bm25s = _bm25s()
    key = digest_of(LAYOUT, corpus.digest, *astuple(settings))
    directory = cache_entry(
        "bm25",
        key,
        lambda partial: _write(partial, corpus, settings, terms),
        about_entry(corpus.directory),
    )
    index = bm25s.BM25.load(directory, mmap=True, show_progress=False)
    # plain views of the mapped files: every slice of a memmap object costs as much as a term
    index.scores = {
        name: np.asarray(part) if isinstance(part, np.ndarray) else part
        for name, part in index.scores.items()
    }
    return Bm25(index, terms, corpus.tie_ranks())


def warn_of_no_matches(without: int, queries: int, consequence: str) -> None:
    """Say that BM25 found no passage for most of the queries, as it does in Chinese or Japanese.

    Args:
        without: queries that no passage was found for.
        queries: all of them.
        consequence: what follows from it.
    """
    if without > queries / 2:
        log.warning(
            "BM25 found no passage for %d of %d queries: %s. %s",
            without,
            queries,
            consequence,
            WORDS,
        )


def _write(directory: Path, corpus: Corpus, settings: Bm25Settings, terms: Terms) -> None:
    vocabulary: dict[str, int] = {}
    passages: list[array[int]] = []
    with progress_bar(len(corpus), "indexing the corpus", "passages") as bar:
        for batch in corpus.batches():
            for passage in batch:
                found_terms = terms(f"{passage.title} {passage.text}")
                ids = (vocabulary.setdefault(name, len(vocabulary)) for name in found_terms)
                passages.append(array("i", ids))
            bar.update(len(batch))
    if not vocabulary:
        raise DataError(f"no passage of the corpus has a word that BM25 could match. {WORDS}")
    index = _bm25s().BM25(k1=settings.k1, b=settings.b, method="lucene")
    index.index((passages, vocabulary), create_empty_token=False, show_progress=False)
    index.save(directory, show_progress=False)


def _best(scores: np.ndarray, k: int, ranks: np.ndarray) -> np.ndarray:
    """Rows of the k highest scores above 0, the best first, equal ones by rank."""
    (rows,) = np.nonzero(scores > 0)
    values = scores[rows]
    if len(rows) > k:
        kept = values >= np.partition(values, -k)[-k]
        rows, values = rows[kept], values[kept]
    order = np.lexsort((ranks[rows], -values))[:k]
    return rows[order]


def _bm25s():  # type: ignore[no-untyped-def]
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("BM25 needs bm25s: pip install bm25s") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets its own logger to DEBUG
    return bm25s


def _stop_words(language: str) -> Sequence[str]:
    """bm25s' stop words of a language, where it has any."""
    return tuple(getattr(_bm25s().stopwords, f"STOPWORDS_{_code(language)}", ()))


def _code(language: str) -> str:
    return "EN" if language in ("english", "porter") else language.upper()


def _stemmer(language: str) -> Any:
    if language == NO_LANGUAGE:
        return None
    try:
        import Stemmer
    except ImportError as error:
        raise MissingExtraError("stemming needs PyStemmer: pip install PyStemmer") from error
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        raise UsageError(
            f"language {language!r}: expected {NO_LANGUAGE} or one of "
            f"{', '.join(sorted(Stemmer.algorithms()))}"
        ) from None
