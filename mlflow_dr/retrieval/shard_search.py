"""Encoding and search of one shard of a corpus: what an engine does elsewhere.

Memory does not grow with the shard: vectors are compared with the queries and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.devices import on_device
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.retrieval.encode import check_finite, encode_batches, encode_to_host
from mlflow_dr.retrieval.search import (
    SearchBackend,
    TopK,
    exact_scores,
    find_backend,
    passages_per_chunk,
    queries_per_merge,
    stacked,
)
from mlflow_dr.retrieval.vector_form import ALL, VectorForm
from mlflow_dr.stores.token_table import TokenTable


class VectorRequest(NamedTuple):
    """A `SearchRequest` whose queries are vectors.

    Attributes:
        queries: the rows of its queries among all vectors, `(n_queries,) int64`.
        k: passages per query; 0 for no search.
        within: search only these rows of the corpus, `(n,) int64`; all when None.
        pairs: rows of the corpus to score for each query, whatever their rank; may be none.
        form: the form in which passages are stored.
        ranges: of each dimension, for int8, `(2, dims) float32`.
    """

    queries: np.ndarray
    k: int
    within: np.ndarray | None
    pairs: Sequence[np.ndarray]
    form: VectorForm = ALL
    ranges: np.ndarray | None = None


class ShardResult(NamedTuple):
    """What one shard gives for one request.

    Attributes:
        rows: best passages of each query, `(n_queries, up to k) int64`.
        scores: their scores, `(n_queries, up to k) float32`.
        pairs: which of the pairs, numbered query by query, are in the shard, `(n,) int64`.
        pair_scores: their scores, `(n,) float32`.
    """

    rows: np.ndarray
    scores: np.ndarray
    pairs: np.ndarray
    pair_scores: np.ndarray


@dataclass(frozen=True)
class EncodeShard:
    """The vectors of a shard; see `Work`.

    Attributes:
        pad_id: the token id of padding.
        of_queries: whether texts are queries, which may have an encoder of their own.
    """

    pad_id: int
    of_queries: bool = False

    def __call__(
        self, encoder: Encoder, table: TokenTable, batches: Iterable[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(n,) int64` and their vectors `(n, dim) float32`."""
        chosen = encoder.query_encoder if self.of_queries else encoder
        parts = [
            (rows, vectors.numpy())
            for rows, vectors in encode_to_host(chosen, table, self.pad_id, batches)
        ]
        rows, vectors = zip(*parts, strict=True)
        return np.concatenate(rows), np.concatenate(vectors)


@dataclass(frozen=True)
class SearchShard:
    """The best passages of a shard for each query; see `Work`.

    Attributes:
        vectors: of all queries, `(n_queries, dim) float32`.
        requests: what is searched.
        tie_ranks: order of passages whose scores are equal, `(n_passages,) int64`.
        pad_id: the token id of padding.
        backend: the name of the search back end.
    """

    vectors: np.ndarray
    requests: Sequence[VectorRequest]
    tie_ranks: np.ndarray
    pad_id: int
    backend: str

    def __call__(
        self, encoder: Encoder, table: TokenTable, batches: Iterable[np.ndarray]
    ) -> list[ShardResult]:
        """A result for each request.

        Raises:
            CheckpointError: vectors have NaN, or their products overflow.
        """
        search = find_backend(self.backend, encoder.device)
        vectors = torch.from_numpy(self.vectors).to(encoder.device)
        ranks = torch.from_numpy(self.tie_ranks).to(encoder.device)
        searches = [_Search(request, vectors, ranks, search) for request in self.requests]
        most = max((request.k for request in self.requests), default=0)
        size = passages_per_chunk(most, encoder.device)
        for rows, chunk in _chunks(encoder, table, self.pad_id, batches, size):
            check_finite(chunk, "passage")
            for searcher in searches:
                searcher.update(chunk, rows)
        return [searcher.result() for searcher in searches]


class _Search:
    """The state of one request while the passages of a shard stream past."""

    def __init__(
        self, request: VectorRequest, vectors: Tensor, ranks: Tensor, search: SearchBackend
    ) -> None:
        device = vectors.device
        self._form, self._ranges = request.form, request.ranges
        queries = vectors[torch.from_numpy(request.queries).to(device)]
        self._queries = self._form.truncated(queries)
        self._search = search
        self._pairs = _PairScores(request.pairs, len(ranks))
        self._groups = self._queries.split(queries_per_merge(request.k)) if request.k else ()
        self._best = [TopK(len(group), request.k, ranks, device) for group in self._groups]
        self._within: Tensor | None = None
        if request.within is not None:
            self._within = torch.zeros(len(ranks), dtype=torch.bool, device=device)
            self._within[torch.from_numpy(request.within).to(device)] = True

    def update(self, chunk: Tensor, rows: Tensor) -> None:
        chunk = self._form.stored(chunk, self._ranges)
        self._pairs.update(self._queries, chunk, rows)
        if self._within is not None:
            searched = self._within[rows]
            chunk, rows = chunk[searched], rows[searched]
        if len(rows):
            for group, best in zip(self._groups, self._best, strict=True):
                best.update(group, chunk, rows, self._search)

    def result(self) -> ShardResult:
        if self._best:
            rows, scores = stacked(self._best)
        else:
            shape = len(self._queries), 0
            rows, scores = np.empty(shape, np.int64), np.empty(shape, np.float32)
        return ShardResult(rows, scores, *self._pairs.found())


class _PairScores:
    """Scores of given pairs of query and passage, found while the passages stream past."""

    def __init__(self, rows: Sequence[np.ndarray], n_passages: int) -> None:
        counts = np.array([len(of_query) for of_query in rows], np.int64)
        self._queries = np.repeat(np.arange(len(rows)), counts)
        self._rows = np.concatenate(rows) if len(rows) else np.empty(0, np.int64)
        self._positions = np.full(n_passages if len(self._rows) else 0, -1, np.int32)
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, queries: Tensor, chunk: Tensor, rows: Tensor) -> None:
        if not len(self._rows):
            return
        chunk_rows = rows.cpu().numpy()
        self._positions[chunk_rows] = np.arange(len(chunk_rows))
        positions = self._positions[self._rows]
        (pairs,) = np.nonzero(positions >= 0)
        query_rows = torch.from_numpy(self._queries[pairs]).to(queries.device)
        passage_rows = torch.from_numpy(positions[pairs].astype(np.int64)).to(chunk.device)
        scores = exact_scores(queries, chunk, query_rows, passage_rows)
        self._found.append((pairs, scores.cpu().numpy()))
        self._positions[chunk_rows] = -1

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the pairs that were seen, and their scores."""
        if not self._found:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        pairs, scores = zip(*self._found, strict=True)
        return np.concatenate(pairs), np.concatenate(scores)


def _chunks(
    encoder: Encoder, table: TokenTable, pad_id: int, batches: Iterable[np.ndarray], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encoded batches gathered into chunks of at least this size: rows and vectors."""
    rows: list[np.ndarray] = []
    vectors: list[Tensor] = []
    gathered = 0
    for batch_rows, batch in encode_batches(encoder, table, pad_id, batches):
        rows.append(batch_rows)
        vectors.append(batch)
        gathered += len(batch_rows)
        if gathered >= size:
            yield _joined(rows, vectors)
            rows, vectors, gathered = [], [], 0
    if rows:
        yield _joined(rows, vectors)


def _joined(rows: list[np.ndarray], vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    joined = torch.cat(vectors)
    return on_device(np.concatenate(rows), joined.device), joined
