"""What searches for negatives: BM25, or any encoder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import UsageError
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.bm25 import Bm25Settings, bm25_index
from mlflow_dr.retrieval.ranking import Found

if TYPE_CHECKING:
    from mlflow_dr.encoder.model import Encoder

BM25 = "bm25"
QUERIES_PER_BATCH = 1024


class Miner(Protocol):
    """Searches a corpus for many queries."""

    def search(
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray]
    ) -> Iterator[Found]:
        """The best k passages of each query, and the scores of the rows in `also`.

        Yields what was found for the first queries, the next, and so on, so that not everything
        has to be in memory at once.
        """


class Bm25Miner:
    """Searches by BM25."""

    def __init__(self, settings: Bm25Settings) -> None:
        self._settings = settings

    def search(
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray]
    ) -> Iterator[Found]:
        """See `Miner`."""
        index = bm25_index(corpus, self._settings)
        with progress_bar(len(queries), "searching by BM25", "queries") as bar:
            for start in range(0, len(queries), QUERIES_PER_BATCH):
                some = slice(start, start + QUERIES_PER_BATCH)
                yield index.search(queries[some], k, also[some])
                bar.update(len(queries[some]))


class DenseMiner:
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
        self, corpus: Corpus, queries: Sequence[Query], k: int, also: Sequence[np.ndarray]
    ) -> Iterator[Found]:
        """See `Miner`; all queries are searched for in one pass over the corpus."""
        from mlflow_dr.encoder.tables import corpus_tokens
        from mlflow_dr.encoder.tokenize import Tokenizing
        from mlflow_dr.retrieval.dense import search_corpus

        tokenizing = Tokenizing(self._encoder.tokenizer, self._encoder.settings)
        table = corpus_tokens(corpus, tokenizing)
        ranks = corpus.tie_ranks()
        yield search_corpus(self._encoder, tokenizing, queries, table, ranks, k, also)


def dense_miner(
    name: str, device: str, dtype: str, trust_remote_code: bool, tracking_uri: str | None
) -> DenseMiner:
    """The miner of an encoder: a directory, a hub name, or `models:/<id>`.

    Raises:
        UsageError: no such encoder, device or dtype.
        CheckpointError: its files are damaged.
        TrackingError: no such model, or no server.
    """
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.tracking.encoders import fetched_encoder

    try:
        with fetched_encoder(name, tracking_uri) as directory:
            encoder = load_encoder(directory, trust_remote_code=trust_remote_code)
    except UsageError as error:
        hint = f"did you mean {BM25}? " if difflib.get_close_matches(name.lower(), [BM25]) else ""
        raise UsageError(f"cannot mine with {name!r}: {hint}{error}") from error
    return DenseMiner(encoder, device, dtype)
