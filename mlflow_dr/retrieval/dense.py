"""Encoding and search in one pass: the corpus streams through the encoder into the search.

Memory does not grow with the corpus: vectors are compared with the queries and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.devices import resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import TokenTable, corpus_tokens, token_table
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import (
    TOKENS_PER_BATCH,
    check_finite,
    encode_all,
    encode_batches,
    plan_batches,
)
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.retrieval.search import (
    AUTO,
    SearchBackend,
    TopK,
    exact_scores,
    find_backend,
)

PASSAGES_PER_CHUNK = 16384
# queries that are merged at a time; merging takes several times the memory of their results
QUERIES_PER_MERGE = 65536


class SearchRequest(NamedTuple):
    """Queries, and which passages of a corpus they search.

    Attributes:
        queries: the queries.
        k: passages per query; fewer are found where there are fewer.
        within: search only these rows of the corpus, ascending, `(n,) int64`; all when None.
        candidates: the only rows that each query ranks; None for no such limit.
        extra_rows: rows to score whatever their rank: nothing, or one array per query.
    """

    queries: Sequence[Query]
    k: int
    within: np.ndarray | None = None
    candidates: Sequence[np.ndarray] | None = None
    extra_rows: Sequence[np.ndarray] = ()


class DenseRetriever:
    """Searches by an encoder's vectors.

    Args:
        encoder: encodes queries and passages.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`.
        backend: a name in `SEARCH_BACKENDS`, or `auto`.

    Raises:
        DeviceError: no such device or dtype.
        UsageError: no such back end.
    """

    def __init__(self, encoder: Encoder, device: str, dtype: str, backend: str = AUTO) -> None:
        target = resolve_device(device)
        find_backend(backend, target)
        self._encoder = encoder.eval().to(target, torch_dtype(resolve_dtype(dtype, target)))
        self._backend = backend

    def search(
        self,
        corpus: Corpus,
        queries: Sequence[Query],
        k: int,
        extra_rows: Sequence[np.ndarray] = (),
    ) -> Iterator[SearchResult]:
        """See `Retriever`; one pass over the corpus serves all queries."""
        tokenizer = TextTokenizer(self._encoder.tokenizer, self._encoder.settings)
        yield from dense_search(
            self._encoder,
            tokenizer,
            [SearchRequest(queries, k, extra_rows=extra_rows)],
            corpus_tokens(corpus, tokenizer),
            corpus.tie_ranks(),
            backend=self._backend,
        )


def dense_search(
    encoder: Encoder,
    text_tokenizer: TextTokenizer,
    requests: Sequence[SearchRequest],
    table: TokenTable,
    tie_ranks: np.ndarray,
    quiet: bool = False,
    backend: str = AUTO,
) -> list[SearchResult]:
    """The best passages of each query, by dot product of vectors that are made on the way.

    Each query, and each passage that some request searches, is encoded once.

    Args:
        encoder: on its device and in its dtype, in evaluation mode.
        text_tokenizer: how the encoder's passages became token ids.
        requests: what to search.
        table: the corpus as token ids.
        tie_ranks: order of passages whose scores are equal, `(n_passages,) int64`.
        quiet: no progress bar.
        backend: a name in `SEARCH_BACKENDS`, or `auto`.

    Raises:
        UsageError: no such back end.
        CheckpointError: the encoder gives NaN or infinity, or vectors whose products overflow.
    """
    search = find_backend(backend, encoder.device)
    query_encoder = encoder.query_encoder
    query_tokenizer = TextTokenizer(query_encoder.tokenizer, query_encoder.settings)
    distinct = list(
        {id(query): query for request in requests for query in request.queries}.values()
    )
    positions = {id(query): position for position, query in enumerate(distinct)}
    ids = token_table(query_tokenizer.query_ids(distinct))
    vectors = encode_all(query_encoder, ids, query_tokenizer.pad_id, "query")
    searches = [
        _Search(
            request,
            vectors[[positions[id(query)] for query in request.queries]],
            tie_ranks,
            search,
        )
        for request in requests
    ]
    rows = rows_to_encode(requests, len(table))
    total = len(table) if rows is None else len(rows)
    with progress_bar(total, "encoding the corpus", "passages", quiet) as bar:
        for chunk_rows, chunk in _chunks(encoder, table, text_tokenizer.pad_id, rows, bar):
            check_finite(chunk, "passage")
            for searcher in searches:
                searcher.update(chunk, chunk_rows)
    return [searcher.result() for searcher in searches]


def rows_to_encode(requests: Sequence[SearchRequest], n_passages: int) -> np.ndarray | None:
    """The rows that some request searches, ascending, `(n,) int64`; None for all."""
    wanted = np.zeros(n_passages, bool)
    for request in requests:
        if request.candidates is not None:
            groups = request.candidates
        elif request.within is None:
            return None
        else:
            groups = [request.within]
        for rows in (*groups, *request.extra_rows):
            wanted[rows] = True
    return np.flatnonzero(wanted)


class _Search:
    """The state of one request while the passages stream past."""

    def __init__(
        self, request: SearchRequest, queries: Tensor, tie_ranks: np.ndarray, search: SearchBackend
    ) -> None:
        self._request = request
        self._queries = queries
        self._ranks = tie_ranks
        self._search = search
        self._pairs = _PairScores(request.candidates or request.extra_rows, len(tie_ranks))
        self._groups = () if request.candidates else queries.split(QUERIES_PER_MERGE)
        self._best = [
            TopK(len(group), request.k, tie_ranks, queries.device) for group in self._groups
        ]
        self._within: Tensor | None = None
        if request.within is not None:
            self._within = torch.zeros(len(tie_ranks), dtype=torch.bool, device=queries.device)
            self._within[torch.from_numpy(request.within).to(queries.device)] = True

    def update(self, chunk: Tensor, rows: Tensor) -> None:
        self._pairs.update(self._queries, chunk, rows)
        if self._within is not None:
            searched = self._within[rows]
            chunk, rows = chunk[searched], rows[searched]
        if len(rows):
            for group, best in zip(self._groups, self._best, strict=True):
                best.update(group, chunk, rows, self._search)

    def result(self) -> SearchResult:
        if self._request.candidates is not None:
            return rank_candidates(
                self._request.candidates, self._pairs.scores(), self._request.k, self._ranks
            )
        return SearchResult(
            np.concatenate([best.rows.cpu().numpy() for best in self._best]),
            np.concatenate([best.scores.cpu().numpy() for best in self._best]),
            self._pairs.scores(),
        )


def rank_candidates(
    candidates: Sequence[np.ndarray], scores: Sequence[np.ndarray], k: int, ranks: np.ndarray
) -> SearchResult:
    """Each query's own candidates by descending score, equal scores by ascending rank.

    Args:
        candidates: rows of each query, `(n_candidates,) int64`.
        scores: their scores, `(n_candidates,) float32`.
        k: how many to keep.
        ranks: order of passages whose scores are equal, `(n_passages,) int64`.
    """
    width = min(k, max((len(rows) for rows in candidates), default=0))
    best = np.full((len(candidates), width), -1, np.int64)
    values = np.full((len(candidates), width), -np.inf, np.float32)
    for index, (rows, of_query) in enumerate(zip(candidates, scores, strict=True)):
        order = np.lexsort((ranks[rows], -of_query))[:width]
        best[index, : len(order)] = rows[order]
        values[index, : len(order)] = of_query[order]
    return SearchResult(best, values, [])


class _PairScores:
    """Scores of given pairs of query and passage, filled while the passages stream past."""

    def __init__(self, rows: Sequence[np.ndarray], n_passages: int) -> None:
        counts = np.array([len(of_query) for of_query in rows], np.int64)
        self._ends = np.cumsum(counts)
        self._queries = np.repeat(np.arange(len(rows)), counts)
        self._rows = np.concatenate(rows) if len(rows) else np.empty(0, np.int64)
        self._scores = np.empty(len(self._rows), np.float32)
        self._positions = np.full(n_passages if len(self._rows) else 0, -1, np.int32)

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
        self._scores[pairs] = scores.cpu().numpy()
        self._positions[chunk_rows] = -1

    def scores(self) -> list[np.ndarray]:
        return np.split(self._scores, self._ends[:-1]) if len(self._ends) else []


def _chunks(
    encoder: Encoder, table: TokenTable, pad_id: int, wanted: np.ndarray | None, bar: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encoded batches gathered into chunks that are worth a search: rows and vectors."""
    rows: list[np.ndarray] = []
    vectors: list[Tensor] = []
    gathered = 0
    batches = plan_batches(table.lengths, TOKENS_PER_BATCH[encoder.device.type], wanted)
    for batch_rows, batch in encode_batches(encoder, table, pad_id, batches):
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
