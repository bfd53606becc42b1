"""Searching a corpus for many queries at once: by BM25, or by any encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.bm25 import Bm25Settings, bm25_index
from mlflow_dr.retrieval.ranking import Found

if TYPE_CHECKING:
    from mlflow_dr.encoder.model import Encoder

QUERIES_PER_BATCH = 1024


class Searcher(Protocol):
    """Searches a corpus for many queries."""

    def search(
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray] = ()
    ) -> Iterator[Found]:
        """The best k passages of each query, and the scores of the rows in `also`.

        Yields what was found for the first queries, the next, and so on, so that not everything
        has to be in memory at once.
        """


class Bm25Searcher:
    """Searches by BM25."""

    def __init__(self, settings: Bm25Settings | None = None) -> None:
        self._settings = settings

    def search(
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray] = ()
    ) -> Iterator[Found]:
        """See `Searcher`."""
        index = bm25_index(corpus, self._settings)
        with progress_bar(len(queries), "searching by BM25", "queries") as bar:
            for start in range(0, len(queries), QUERIES_PER_BATCH):
                some = slice(start, start + QUERIES_PER_BATCH)
                yield index.search(queries[some], k, also[some])
                bar.update(len(queries[some]))


class DenseSearcher:
    """Searches by an encoder's vectors.

    Args:
        encoder: what encodes queries and passages.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`.

    Raises:
        DeviceError: no such device or dtype.
    """

    def __init__(self, encoder: Encoder, device: str, dtype: str) -> None:
        from mlflow_dr.engines.devices import DTYPES, resolve_device, resolve_dtype

        place = resolve_device(device)
        self._encoder = encoder.eval().to(place, DTYPES[resolve_dtype(dtype, place)])

    def search(
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray] = ()
    ) -> Iterator[Found]:
        """See `Searcher`; all queries are searched for in one pass over the corpus."""
        from mlflow_dr.encoder.tables import corpus_tokens
        from mlflow_dr.encoder.tokenize import Tokenizing
        from mlflow_dr.retrieval.dense import search_corpus

        tokenizing = Tokenizing(self._encoder.tokenizer, self._encoder.settings)
        table = corpus_tokens(corpus, tokenizing)
        ranks = corpus.tie_ranks()
        yield search_corpus(self._encoder, tokenizing, queries, table, ranks, k, also)
