"""Searches vectors of passages for vectors of queries, exactly, file by file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.collection.corpus import tie_ranks
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.devices import resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.fields import LARGEST
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.measures import (
    Measure,
    check_depth,
    mean_values,
    measure_ranking,
    parse_measures,
)
from mlflow_dr.retrieval.ranking import (
    Ranking,
    check_ranking_ids,
    merged_ranking,
    named_ranking,
    write_ranking,
)
from mlflow_dr.retrieval.search import TopK, find_backend
from mlflow_dr.retrieval.vectors import Vectors, open_vectors
from mlflow_dr.tracking.encoders import open_encoder
from mlflow_dr.vectors.config import ConvertConfig, SearchConfig, parse_shard
from mlflow_dr.vectors.encoding import encoder_digest, query_texts

log = logging.getLogger(__name__)

PASSAGES_PER_CHUNK = 32768
RESULTS_PER_MERGE = 1 << 21
QUERIES_PER_PART = 1024
UNJUDGED_DEPTH = 1000


class Found(NamedTuple):
    """What a search found.

    Attributes:
        measures: mean values over queries; empty if there are no judgements.
        queries: how many were searched for.
        passages: how many were searched.
    """

    measures: dict[Measure, float]
    queries: int
    passages: int


class _QueryVectors(NamedTuple):
    """Vectors of queries, and what they belong to."""

    ids: list[str]
    vectors: np.ndarray
    encoder_digest: str | None
    dataset: str | None
    split: str | None


def search(config: SearchConfig) -> Found:
    """Rank passages for queries, or merge the rankings of shards, and measure.

    Args:
        config: the vectors, the queries and the ranking to write.

    Raises:
        UsageError: vectors of different encoders, corpora or dimensions, or no queries.
        DataError: a file is damaged, or its ids do not fit the format of the ranking.
        CheckpointError: scores overflow, or the encoder gives NaN.
    """
    if config.output is not None and config.output.exists() and not config.force:
        raise UsageError(f"{config.output} exists already; --force replaces it")
    if config.merge:
        return _merge(config)
    passages = open_vectors(*config.sources, partial=config.partial)
    if passages.n_missing_shards:
        log.warning(
            "searching without %d of %d shards; join the rankings of all by --merge",
            passages.n_missing_shards,
            passages.manifest.shards if passages.manifest else 0,
        )
    if not len(passages) and not config.partial:
        raise UsageError(f"{config.sources[0]}: there are no vectors to search")
    if passages.manifest is not None and passages.manifest.kind == "queries":
        raise UsageError(f"{config.sources[0]} has vectors of queries; name those of passages")
    queries = _queries(config, passages)
    passages.check_queries(
        config.queries or "the queries",
        config.sources[0],
        queries.vectors.shape,
        queries.encoder_digest,
    )
    topics = _topics(config, queries, passages)
    depth = _depth(config, topics is not None)
    if config.output is not None:
        check_ranking_ids(pa.array(queries.ids, pa.string()), config.file_format)
        check_ranking_ids(passages.ids, config.file_format)
    shard, shards = parse_shard(config.shard)
    start, stop = (len(passages) * part // shards for part in (shard, shard + 1))
    rows, scores = exact_search(
        queries.vectors,
        passages,
        depth + (0 if config.keep_own_id else 1),
        config.device,
        config.search_backend,
        (start, stop),
    )

    def rankings() -> Iterator[Ranking]:
        for first in range(0, len(queries.ids), QUERIES_PER_PART):
            part = slice(first, first + QUERIES_PER_PART)
            named = [Query(name, "") for name in queries.ids[part]]
            yield named_ranking(
                named, passages.ids, rows[part], scores[part], depth, config.keep_own_id
            )

    measures = _finish(config, rankings(), topics if shards == 1 and not config.partial else None)
    return Found(measures, len(queries.ids), stop - start)


def exact_search(
    queries: np.ndarray,
    passages: Vectors,
    k: int,
    device: str,
    backend: str,
    rows: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best passages of each query by dot product; equal scores as trec_eval orders them.

    Args:
        queries: `(n_queries, dim) float32`.
        passages: streamed from their files.
        k: passages of each query; fewer are found where there are fewer.
        device: see `resolve_device`.
        backend: a name in `SEARCH_BACKENDS`, or `auto`.
        rows: the first row to search and the row after the last; all when None.

    Returns:
        Rows `(n_queries, <= k) int64`, the best first, and their scores, float32.

    Raises:
        DeviceError: no such device.
        CheckpointError: scores overflow.
    """
    target = resolve_device(device)
    find = find_backend(backend, target)
    start, stop = rows or (0, len(passages))
    ranks = tie_ranks(passages.ids)
    # merging takes several times the memory of its results
    groups = torch.from_numpy(queries).to(target).split(max(64, RESULTS_PER_MERGE // k))
    best = [TopK(len(group), k, ranks, target) for group in groups]
    with progress_bar(stop - start, "searching", "passages") as bar:
        for first, vectors in passages.chunks(start, stop, PASSAGES_PER_CHUNK):
            chunk = torch.from_numpy(vectors).to(target)
            chunk_rows = torch.arange(first, first + len(chunk), device=target)
            for group, top in zip(groups, best, strict=True):
                top.update(group, chunk, chunk_rows, find)
            bar.update(len(chunk))
    found = np.concatenate([top.rows.cpu().numpy() for top in best])
    return found, np.concatenate([top.scores.cpu().numpy() for top in best])


def convert(config: ConvertConfig) -> int:
    """Write a ranking in another format; how many queries it has.

    Raises:
        UsageError: the output exists.
        DataError: a malformed line, or ids that do not fit the format.
    """
    if config.output.exists() and not config.force:
        raise UsageError(f"{config.output} exists already; --force replaces it")
    ranking = merged_ranking([config.input], LARGEST)
    if config.remove_query:
        ranking = {
            query_id: [pair for pair in passages if pair[0] != query_id]
            for query_id, passages in ranking.items()
        }
    write_ranking(config.output, [ranking], config.file_format)
    return len(ranking)


def _merge(config: SearchConfig) -> Found:
    topics = _topics(config, None, None)
    ranking = merged_ranking(config.sources, _depth(config, topics is not None))
    return Found(_finish(config, [ranking], topics), len(ranking), 0)


def _finish(
    config: SearchConfig, rankings: Iterable[Ranking], topics: Topics | None
) -> dict[Measure, float]:
    """Write a ranking and measure it, some queries at a time."""
    measures = parse_measures(config.measures)
    per_query: dict[str, dict[Measure, float]] = {}

    def measured() -> Iterator[Ranking]:
        for ranking in rankings:
            if topics is not None:
                qrels = {name: topics.qrels[name] for name in ranking if name in topics.qrels}
                per_query.update(measure_ranking(ranking, qrels, measures))
            yield ranking

    if config.output is not None:
        write_ranking(config.output, measured(), config.file_format)
    elif topics is not None:
        for _ in measured():
            pass
    if topics is None:
        return {}
    rest = {name: judged for name, judged in topics.qrels.items() if name not in per_query}
    return mean_values(per_query | measure_ranking({}, rest, measures))


def _depth(config: SearchConfig, is_judged: bool) -> int:
    if is_judged:
        deepest = check_depth(parse_measures(config.measures), config.depth)
        return max(deepest, 0 if config.depth or config.output is None else UNJUDGED_DEPTH)
    return config.depth or UNJUDGED_DEPTH


def _queries(config: SearchConfig, passages: Vectors) -> _QueryVectors:
    if config.queries is not None:
        opened = open_vectors(config.queries)
        about = opened.manifest
        return _QueryVectors(
            opened.ids.to_pylist(),
            opened.read(),
            about.encoder_digest if about else None,
            about.dataset if about and about.kind == "queries" else None,
            about.split if about else None,
        )
    name = config.encoder or (passages.manifest.encoder if passages.manifest else None)
    if name is None:
        raise UsageError(
            "give --queries, the vectors of the queries; or --encoder and --dataset, whose queries "
            "are encoded now"
        )
    dataset = config.named_dataset()[0] or (passages.manifest and passages.manifest.dataset)
    if not dataset:
        raise UsageError("give --dataset, whose queries are searched for")
    collection = open_collection(dataset)
    split = chosen_split(collection, config.split)
    encoder = open_encoder(name, config.tracking_uri, trust_remote_code=config.trust_remote_code)
    digest = encoder_digest(encoder)
    texts = query_texts(encoder, collection.topics(split))
    device = resolve_device(config.device)
    dtype = passages.manifest.dtype if passages.manifest else config.dtype
    if config.dtype != "auto":
        dtype = config.dtype
    target = texts.encoder.eval().to(device, torch_dtype(resolve_dtype(dtype, device)))
    vectors = encode_all(target, texts.table, texts.pad_id, "query").cpu().numpy()
    return _QueryVectors(texts.ids.to_pylist(), vectors, digest, dataset, split)


def _topics(
    config: SearchConfig, queries: _QueryVectors | None, passages: Vectors | None
) -> Topics | None:
    """The judgements; None where nothing names a collection that has some."""
    dataset, split = config.named_dataset()[0], config.split
    if dataset is None and queries is not None:
        dataset, split = queries.dataset, split or queries.split
    if not dataset:  # files of texts have none
        return None
    collection = open_collection(dataset)
    about = passages.manifest if passages else None
    if about and collection.corpus().digest != about.texts_digest:
        raise UsageError(
            f"{config.sources[0]} has vectors of another corpus ({about.dataset}) than {dataset}"
        )
    topics = collection.topics(chosen_split(collection, split))
    unknown = set(queries.ids) - {query.id for query in topics.queries} if queries else set()
    if queries and len(unknown) == len(queries.ids):
        raise UsageError(
            f"no query of {config.queries} is judged in {dataset}, such as {quoted(min(unknown))}"
        )
    return topics
