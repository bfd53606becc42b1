"""Encoding and search in one pass: an engine does the shards, and their results are merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.devices import resolve_devices, resolve_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.engine import Engine, split_shards
from mlflow_dr.engines.local import LocalEngine
from mlflow_dr.engines.opening import open_engine
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import check_finite, plan_batches, tokens_per_batch
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.retrieval.search import AUTO, TopK, find_backend, queries_per_merge, stacked
from mlflow_dr.retrieval.shard_search import (
    EncodeShard,
    SearchShard,
    ShardResult,
    VectorRequest,
)
from mlflow_dr.retrieval.vector_form import (
    ALL,
    INT8,
    VectorForm,
    check_dims,
    ranges_of,
    sampled_rows,
)
from mlflow_dr.stores.token_table import TokenTable, token_table


class _Plan(NamedTuple):
    """What `plan_batches` was asked for a table, and the batches."""

    max_tokens: int
    rows: np.ndarray | None
    batches: list[np.ndarray]


_plans: WeakKeyDictionary[TokenTable, _Plan] = WeakKeyDictionary()


class SearchRequest(NamedTuple):
    """Queries, and which passages of a corpus they search.

    Attributes:
        queries: the queries.
        k: passages per query; fewer are found where there are fewer.
        within: search only these rows of the corpus, ascending, `(n,) int64`; all when None.
        candidates: the only rows that each query ranks; None for no such limit.
        extra_rows: rows to score whatever their rank: nothing, or one array per query.
        form: the form in which passages are stored.
    """

    queries: Sequence[Query]
    k: int
    within: np.ndarray | None = None
    candidates: Sequence[np.ndarray] | None = None
    extra_rows: Sequence[np.ndarray] = ()
    form: VectorForm = ALL


class DenseRetriever:
    """Searches by an encoder's vectors.

    Args:
        encoder: encodes queries and passages.
        device: see `resolve_devices`.
        dtype: see `resolve_dtype`.
        backend: a name in `SEARCH_BACKENDS`, or `auto`.

    Raises:
        DeviceError: no such device or dtype.
        UsageError: no such back end.
    """

    def __init__(self, encoder: Encoder, device: str, dtype: str, backend: str = AUTO) -> None:
        target = resolve_devices(device)[0]
        find_backend(backend, target)
        self._encoder = encoder
        self._device, self._dtype = device, resolve_dtype(dtype, target)
        self._backend = backend

    def search(
        self,
        corpus: Corpus,
        queries: Sequence[Query],
        k: int,
        extra_rows: Sequence[np.ndarray] = (),
    ) -> Iterator[SearchResult]:
        """See `Retriever`; one pass over the corpus serves all queries."""
        tokenizer = TextTokenizer.of(self._encoder)
        with closing(open_engine(device=self._device)) as engine:
            engine.load(self._encoder, self._dtype)
            results = dense_search(
                self._encoder,
                tokenizer,
                [SearchRequest(queries, k, extra_rows=extra_rows)],
                corpus_tokens(corpus, tokenizer),
                corpus.tie_ranks(),
                backend=self._backend,
                engine=engine,
            )
        yield from results


def dense_search(
    encoder: Encoder,
    text_tokenizer: TextTokenizer,
    requests: Sequence[SearchRequest],
    table: TokenTable,
    tie_ranks: np.ndarray,
    quiet: bool = False,
    backend: str = AUTO,
    engine: Engine | None = None,
) -> list[SearchResult]:
    """The best passages of each query, by dot product of vectors that are made on the way.

    Each query, and each passage that some request searches, is encoded once.

    Args:
        encoder: in evaluation mode; on its device and in its dtype, if there is no engine.
        text_tokenizer: how the encoder's passages became token ids.
        requests: what to search.
        table: the corpus as token ids.
        tie_ranks: order of passages whose scores are equal, `(n_passages,) int64`.
        quiet: no progress bar.
        backend: a name in `SEARCH_BACKENDS`, or `auto`.
        engine: where the encoder is loaded; this process when None.

    Raises:
        UsageError: no such back end, or a form with more dimensions than there are.
        CheckpointError: the encoder gives NaN or infinity, or vectors whose products overflow.
    """
    check_dims([request.form.dims for request in requests], encoder.dimension)
    engine = engine or LocalEngine(encoder.device, encoder)
    find_backend(backend, engine.device)
    distinct = list(
        {id(query): query for request in requests for query in request.queries}.values()
    )
    ranges = _ranges(engine, requests, table, text_tokenizer.pad_id, encoder)
    positions = {id(query): position for position, query in enumerate(distinct)}
    work = SearchShard(
        _query_vectors(engine, encoder.query_encoder, distinct),
        [
            VectorRequest(
                np.array([positions[id(query)] for query in request.queries], np.int64),
                request.k if request.candidates is None else 0,
                request.within,
                request.candidates or request.extra_rows,
                request.form,
                request_ranges,
            )
            for request, request_ranges in zip(requests, ranges, strict=True)
        ],
        tie_ranks,
        text_tokenizer.pad_id,
        backend,
    )
    rows = rows_to_encode(requests, len(table))
    batches = _kept_plan(table, tokens_per_batch(encoder, engine.device), rows)
    total = len(table) if rows is None else len(rows)
    with progress_bar(total, "encoding the corpus", "passages", quiet) as bar:
        shards = split_shards(batches, engine.n_shards)
        merges = _merged(requests, tie_ranks, engine.map(work, table, shards, bar.update))
    return [merge.result() for merge in merges]


def _kept_plan(table: TokenTable, max_tokens: int, rows: np.ndarray | None) -> list[np.ndarray]:
    """See `plan_batches`. The last plan of a table is kept, as each checkpoint has the same."""
    kept = _plans.get(table)
    if kept is None or kept.max_tokens != max_tokens or not _are_same_rows(kept.rows, rows):
        kept = _plans[table] = _Plan(
            max_tokens, rows, plan_batches(table.lengths, max_tokens, rows)
        )
    return kept.batches


def _are_same_rows(some: np.ndarray | None, others: np.ndarray | None) -> bool:
    return some is others or (
        some is not None and others is not None and np.array_equal(some, others)
    )


def _query_vectors(engine: Engine, encoder: Encoder, queries: Sequence[Query]) -> np.ndarray:
    """The vector of each query, `(n_queries, dim) float32`."""
    tokenizer = TextTokenizer.of(encoder)
    table = token_table(tokenizer.query_ids(queries))
    batches = plan_batches(table.lengths, tokens_per_batch(encoder, engine.device))
    work = EncodeShard(tokenizer.pad_id, of_queries=True)
    vectors = np.empty((len(table), encoder.dimension), np.float32)
    for rows, part in engine.map(
        work, table, split_shards(batches, engine.n_shards), progress=lambda _: None
    ):
        vectors[rows] = part
    check_finite(torch.from_numpy(vectors), "query")
    return vectors


def _ranges(
    engine: Engine,
    requests: Sequence[SearchRequest],
    table: TokenTable,
    pad_id: int,
    encoder: Encoder,
) -> list[np.ndarray | None]:
    """For each request in int8, the range of each dimension in a sample of its passages.

    The sample is encoded once more. It depends only on what the request searches, so its ranges
    are the same whichever requests share the pass.
    """
    vectors: dict[bytes, torch.Tensor] = {}
    ranges: list[np.ndarray | None] = []
    for request in requests:
        if request.form.precision != INT8:
            ranges.append(None)
            continue
        rows = rows_to_encode([request], len(table))
        sample = sampled_rows(np.arange(len(table)) if rows is None else rows)
        key = sample.tobytes()
        if key not in vectors:
            batches = plan_batches(table.lengths, tokens_per_batch(encoder, engine.device), sample)
            found = np.empty((len(sample), encoder.dimension), np.float32)
            shards = split_shards(batches, engine.n_shards)
            for part_rows, part in engine.map(
                EncodeShard(pad_id), table, shards, progress=lambda _: None
            ):
                found[np.searchsorted(sample, part_rows)] = part
            vectors[key] = torch.from_numpy(found)
            check_finite(vectors[key], "passage")
        ranges.append(ranges_of(request.form.truncated(vectors[key]).numpy()))
    return ranges


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


class _Merge:
    """The result of one request, from the results of shards."""

    def __init__(self, request: SearchRequest, tie_ranks: np.ndarray) -> None:
        self._request = request
        self._ranks = tie_ranks
        size = queries_per_merge(request.k)
        starts = range(0, max(1, len(request.queries)), size)
        self._groups = [slice(start, start + size) for start in starts]
        self._best = [
            TopK(len(request.queries[group]), request.k, tie_ranks) for group in self._groups
        ]
        counts = [len(rows) for rows in request.candidates or request.extra_rows]
        self._ends = np.cumsum(counts)
        self._scores = np.empty(sum(counts), np.float32)

    def add(self, result: ShardResult) -> None:
        self._scores[result.pairs] = result.pair_scores
        for group, best in zip(self._groups, self._best, strict=True):
            scores, rows = result.scores[group], result.rows[group]
            best.merge(torch.tensor(scores), torch.tensor(rows))

    def result(self) -> SearchResult:
        scores = np.split(self._scores, self._ends[:-1]) if len(self._ends) else []
        if self._request.candidates is not None:
            return rank_candidates(self._request.candidates, scores, self._request.k, self._ranks)
        return SearchResult(*stacked(self._best), scores)


def _merged(
    requests: Sequence[SearchRequest],
    tie_ranks: np.ndarray,
    of_shards: Iterable[Sequence[ShardResult]],
) -> list[_Merge]:
    """The results of all shards, merged for each request."""
    merges = [_Merge(request, tie_ranks) for request in requests]
    for results in of_shards:
        for merge, result in zip(merges, results, strict=True):
            merge.add(result)
    return merges


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
