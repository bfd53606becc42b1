"""Encoding and search in one pass: a corpus streams through an encoder and is compared as it comes.

Memory does not grow with the corpus: vectors are compared with the queries and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import check_finite, encode_all, encode_batches
from mlflow_dr.retrieval.ranking import Found
from mlflow_dr.retrieval.search import TopK, default_search
from mlflow_dr.stores.token_table import TokenTable, token_table

PASSAGES_PER_CHUNK = 16384
# merging the best so far takes several times their memory: so many queries are merged at a time
QUERIES_PER_MERGE = 65536


def search_corpus(
    encoder: Encoder,
    tokenizing: Tokenizing,
    queries: Sequence[Query],
    table: TokenTable,
    tie_ranks: np.ndarray,
    k: int,
    also: Sequence[np.ndarray] = (),
    quiet: bool = False,
) -> Found:
    """The best k passages of each query, by dot product of vectors that are made on the way.

    Args:
        encoder: on its device and in its dtype, in evaluation mode.
        tokenizing: how the encoder's passages became token ids.
        queries: what is asked.
        table: the corpus as token ids.
        tie_ranks: each passage's place among equal scores, `(n_passages,) int64`.
        k: passages for each query; no more than the corpus has are found.
        also: for each query rows whose scores are wanted whatever their rank; nothing, or one
            array for each query.
        quiet: no progress bar.

    Raises:
        CheckpointError: the encoder gives NaN or infinity, or vectors whose products overflow.
    """
    tower = encoder.for_queries
    asking = Tokenizing(tower.tokenizer, tower.settings)
    vectors = encode_all(tower, token_table(asking.query_ids(queries)), asking.pad_id, "query")
    device = vectors.device
    groups = vectors.split(QUERIES_PER_MERGE)
    tops = [TopK(len(group), k, tie_ranks, device) for group in groups]
    pairs = _Pairs(also, len(table))
    search = default_search(device)
    with progress_bar(len(table), "encoding the corpus", "passages", quiet) as bar:
        for rows, chunk in _chunks(encoder, table, tokenizing.pad_id, bar):
            check_finite(chunk, "passage")
            pairs.update(vectors, chunk, rows)
            for group, top in zip(groups, tops, strict=True):
                top.update(group, chunk, rows, search)
    return Found(
        np.concatenate([top.rows.cpu().numpy() for top in tops]),
        np.concatenate([top.scores.cpu().numpy() for top in tops]),
        pairs.scores(),
    )


class _Pairs:
    """Scores of given pairs of query and passage, as the passages come by."""

    def __init__(self, rows: Sequence[np.ndarray], n_passages: int) -> None:
        counts = np.array([len(one) for one in rows], np.int64)
        self._ends = np.cumsum(counts)
        self._queries = np.repeat(np.arange(len(rows)), counts)
        self._rows = np.concatenate(rows) if len(rows) else np.empty(0, np.int64)
        self._scores = np.empty(len(self._rows), np.float32)
        self._place = np.full(n_passages if len(self._rows) else 0, -1, np.int32)

    def update(self, queries: Tensor, chunk: Tensor, rows: Tensor) -> None:
        if not len(self._rows):
            return
        of_chunk = rows.cpu().numpy()
        self._place[of_chunk] = np.arange(len(of_chunk))
        places = self._place[self._rows]
        (here,) = np.nonzero(places >= 0)
        for some in np.array_split(here, 1 + len(here) // QUERIES_PER_MERGE):
            left = queries[torch.from_numpy(self._queries[some]).to(queries.device)]
            right = chunk[torch.from_numpy(places[some].astype(np.int64)).to(chunk.device)]
            self._scores[some] = (left * right).sum(dim=1).cpu().numpy()
        self._place[of_chunk] = -1

    def scores(self) -> list[np.ndarray]:
        return np.split(self._scores, self._ends[:-1]) if len(self._ends) else []


def _chunks(
    encoder: Encoder, table: TokenTable, pad_id: int, bar: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encoded batches gathered into chunks that are worth a search: rows and vectors."""
    rows: list[np.ndarray] = []
    vectors: list[Tensor] = []
    gathered = 0
    for batch_rows, batch in encode_batches(encoder, table, pad_id):
        rows.append(batch_rows)
        vectors.append(batch)
        gathered += len(batch_rows)
        bar.update(len(batch_rows))
        if gathered >= PASSAGES_PER_CHUNK:
            yield _joined(rows, vectors)
            rows, vectors, gathered = [], [], 0
    if rows:
        yield _joined(rows, vectors)


def _joined(rows: list[np.ndarray], vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    joined = torch.cat(vectors)
    return torch.from_numpy(np.concatenate(rows)).to(joined.device), joined
