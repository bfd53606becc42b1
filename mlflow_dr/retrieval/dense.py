"""Encoding and search in one pass: a corpus streams through an encoder and is compared as it comes.

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
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_cache import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.devices import resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.errors import CheckpointError
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import check_finite, encode_all, encode_batches
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.retrieval.search import OVERFLOW, TopK, default_backend
from mlflow_dr.stores.token_table import TokenTable, token_table

PASSAGES_PER_CHUNK = 16384
# merging the best so far takes several times their memory: so many queries are merged at a time
QUERIES_PER_MERGE = 65536


class SearchRequest(NamedTuple):
    """What is sought in one pass over a corpus.

    Attributes:
        queries: what is asked.
        k: passages for each query; no more than there are are found.
        within: only these rows of the corpus, ascending, `(n,) int64`; all when None.
        candidates: for each query the only rows that it ranks; None for no such limit.
        extra_rows: for each query the rows to score whatever their rank; nothing, or one
            array for each query.
    """

    queries: Sequence[Query]
    k: int
    within: np.ndarray | None = None
    candidates: Sequence[np.ndarray] | None = None
    extra_rows: Sequence[np.ndarray] = ()


class DenseRetriever:
    """Searches by an encoder's vectors.

    Args:
        encoder: what encodes queries and passages.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`.

    Raises:
        DeviceError: no such device or dtype.
    """

    def __init__(self, encoder: Encoder, device: str, dtype: str) -> None:
        place = resolve_device(device)
        self._encoder = encoder.eval().to(place, torch_dtype(resolve_dtype(dtype, place)))

    def search(
        self,
        corpus: Corpus,
        queries: Sequence[Query],
        k: int,
        extra_rows: Sequence[np.ndarray] = (),
    ) -> Iterator[SearchResult]:
        """See `Retriever`; all queries are searched for in one pass over the corpus."""
        text_tokenizer = TextTokenizer(self._encoder.tokenizer, self._encoder.settings)
        table = corpus_tokens(corpus, text_tokenizer)
        ranks = corpus.tie_ranks()
        yield search_corpus(self._encoder, text_tokenizer, queries, table, ranks, k, extra_rows)


def search_corpus(
    encoder: Encoder,
    text_tokenizer: TextTokenizer,
    queries: Sequence[Query],
    table: TokenTable,
    tie_ranks: np.ndarray,
    k: int,
    extra_rows: Sequence[np.ndarray] = (),
    quiet: bool = False,
) -> SearchResult:
    """The best k passages of each query of one search over a whole corpus; see `dense_search`."""
    search = SearchRequest(queries, k, extra_rows=extra_rows)
    (found,) = dense_search(encoder, text_tokenizer, [search], table, tie_ranks, quiet)
    return found


def dense_search(
    encoder: Encoder,
    text_tokenizer: TextTokenizer,
    searches: Sequence[SearchRequest],
    table: TokenTable,
    tie_ranks: np.ndarray,
    quiet: bool = False,
) -> list[SearchResult]:
    """The best passages of each query, by dot product of vectors that are made on the way.

    Each query, and each passage that some search wants, is encoded once.

    Args:
        encoder: on its device and in its dtype, in evaluation mode.
        tokenizing: how the encoder's passages became token ids.
        searches: what is sought.
        table: the corpus as token ids.
        tie_ranks: each passage's place among equal scores, `(n_passages,) int64`.
        quiet: no progress bar.

    Raises:
        CheckpointError: the encoder gives NaN or infinity, or vectors whose products overflow.
    """
    tower = encoder.query_encoder
    asking = TextTokenizer(tower.tokenizer, tower.settings)
    distinct, places = _distinct([one.queries for one in searches])
    vectors = encode_all(tower, token_table(asking.query_ids(distinct)), asking.pad_id, "query")
    seekers = [
        _Seeker(search, vectors[torch.from_numpy(place).to(vectors.device)], tie_ranks)
        for search, place in zip(searches, places, strict=True)
    ]
    rows = rows_to_encode(searches, len(table))
    total = len(table) if rows is None else len(rows)
    with progress_bar(total, "encoding the corpus", "passages", quiet) as bar:
        for of_chunk, chunk in _chunks(encoder, table, text_tokenizer.pad_id, rows, bar):
            check_finite(chunk, "passage")
            for seeker in seekers:
                seeker.update(chunk, of_chunk)
    return [seeker.found() for seeker in seekers]


def rows_to_encode(searches: Sequence[SearchRequest], n_passages: int) -> np.ndarray | None:
    """The rows that some search wants, ascending, `(n,) int64`; None for all."""
    wanted = np.zeros(n_passages, bool)
    for one in searches:
        if one.candidates is not None:
            for rows in one.candidates:
                wanted[rows] = True
        elif one.within is None:
            return None
        else:
            wanted[one.within] = True
        for rows in one.extra_rows:
            wanted[rows] = True
    return np.flatnonzero(wanted)


def _distinct(groups: Sequence[Sequence[Query]]) -> tuple[list[Query], list[np.ndarray]]:
    """Each query once, and where the queries of each group are among them."""
    places: dict[int, int] = {}
    distinct: list[Query] = []
    for query in (query for group in groups for query in group):
        if places.setdefault(id(query), len(distinct)) == len(distinct):
            distinct.append(query)
    return distinct, [np.array([places[id(one)] for one in group], np.int64) for group in groups]


class _Seeker:
    """One search, as the passages come by."""

    def __init__(self, search: SearchRequest, queries: Tensor, tie_ranks: np.ndarray) -> None:
        self._search = search
        self._queries = queries
        self._ranks = tie_ranks
        self._method = default_backend(queries.device)
        self._pairs = _Pairs(search.candidates or search.extra_rows, len(tie_ranks))
        self._groups = () if search.candidates else queries.split(QUERIES_PER_MERGE)
        self._tops = [
            TopK(len(group), search.k, tie_ranks, queries.device) for group in self._groups
        ]
        self._within: Tensor | None = None
        if search.within is not None:
            self._within = torch.zeros(len(tie_ranks), dtype=torch.bool, device=queries.device)
            self._within[torch.from_numpy(search.within).to(queries.device)] = True

    def update(self, chunk: Tensor, rows: Tensor) -> None:
        self._pairs.update(self._queries, chunk, rows)
        if self._within is not None:
            here = self._within[rows]
            chunk, rows = chunk[here], rows[here]
        if len(rows):
            for group, top in zip(self._groups, self._tops, strict=True):
                top.update(group, chunk, rows, self._method)

    def found(self) -> SearchResult:
        if self._search.candidates is not None:
            return rank_candidates(
                self._search.candidates, self._pairs.scores(), self._search.k, self._ranks
            )
        return SearchResult(
            np.concatenate([top.rows.cpu().numpy() for top in self._tops]),
            np.concatenate([top.scores.cpu().numpy() for top in self._tops]),
            self._pairs.scores(),
        )


def rank_candidates(
    candidates: Sequence[np.ndarray], scores: Sequence[np.ndarray], k: int, ranks: np.ndarray
) -> SearchResult:
    """Each query's own candidates by descending score, equal ones by rank.

    Args:
        candidates: rows of each query, `(n_candidates,) int64`.
        scores: their scores, `(n_candidates,) float32`.
        k: how many to keep.
        ranks: each passage's place among equal scores, `(n_passages,) int64`.

    Raises:
        CheckpointError: the scores overflow.
    """
    width = min(k, max((len(rows) for rows in candidates), default=0))
    best = np.full((len(candidates), width), -1, np.int64)
    values = np.full((len(candidates), width), -np.inf, np.float32)
    for place, (rows, of_query) in enumerate(zip(candidates, scores, strict=True)):
        if not np.isfinite(of_query).all():
            raise CheckpointError(OVERFLOW)
        order = np.lexsort((ranks[rows], -of_query))[:width]
        best[place, : len(order)] = rows[order]
        values[place, : len(order)] = of_query[order]
    return SearchResult(best, values, [])


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
    encoder: Encoder, table: TokenTable, pad_id: int, wanted: np.ndarray | None, bar: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encoded batches gathered into chunks that are worth a search: rows and vectors."""
    rows: list[np.ndarray] = []
    vectors: list[Tensor] = []
    gathered = 0
    for batch_rows, batch in encode_batches(encoder, table, pad_id, rows=wanted):
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
