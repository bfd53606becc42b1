"""Searches vectors of passages for vectors of queries, exactly, file by file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.collection.corpus import Corpus, tie_ranks
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.collection.results import write_results
from mlflow_dr.devices import resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.fields import LARGEST
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.measures import (
    DEFAULT_OF_ANSWERS,
    Measure,
    check_depth,
    check_topics,
    parse_measures,
)
from mlflow_dr.retrieval.ranking import (
    NamedRanking,
    Ranking,
    check_ranking_ids,
    merged_ranking,
    n_excluded,
    without_excluded,
    write_ranking,
)
from mlflow_dr.retrieval.search import (
    TopK,
    find_backend,
    passages_per_chunk,
    queries_per_merge,
    stacked,
)
from mlflow_dr.retrieval.vectors import Vectors, open_vectors
from mlflow_dr.tracking.encoders import open_encoder
from mlflow_dr.vectors.config import ConvertConfig, SearchConfig, parse_shard
from mlflow_dr.vectors.encoding import encoder_digest, query_texts
from mlflow_dr.vectors.found import Found, Hit
from mlflow_dr.vectors.judging import Judge, RankingPart, corpus_rows, ranking_rows

log = logging.getLogger(__name__)

QUERIES_PER_PART = 1024
UNJUDGED_DEPTH = 1000
DEPTH_OF_QUESTIONS = 10
NO_ROWS = np.empty((0, 0), np.int64)
RESULTS_DEPTH = 100  # as in DPR


class _QueryVectors(NamedTuple):
    """Vectors of queries, and what they belong to."""

    ids: list[str]
    vectors: np.ndarray
    encoder_digest: str | None
    dataset: str | None
    split: str | None
    texts_digest: str | None = None


class _Split(NamedTuple):
    """The queries that a ranking is measured with."""

    location: str
    corpus: Corpus
    topics: Topics


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
    passages = _open_passages(config)
    queries = _queries(config, passages)
    passages.check_queries(
        config.queries or "the queries",
        config.sources[0],
        queries.vectors.shape,
        queries.encoder_digest,
    )
    split = _split(config, queries, passages)
    depth = _depth(config, split is not None)
    if config.output is not None and not config.writes_results:
        check_ranking_ids(pa.array(queries.ids, pa.string()), config.layout)
        check_ranking_ids(passages.ids, config.layout)
    shard, shards = parse_shard(config.shard)
    start, stop = (len(passages) * part // shards for part in (shard, shard + 1))
    is_measured = shards == 1 and (config.writes_results or not config.partial)
    keep_own_id = config.keep_own_id or (split is not None and not split.topics.qrels)
    known = split.topics.queries if split is not None else ()
    with _judge(config, split if is_measured else None) as judge:
        if judge is not None:
            judge.prepare(len(queries.ids), depth)
        rows, scores = exact_search(
            queries.vectors,
            passages,
            depth + n_excluded(known, keep_own_id),
            config.device,
            config.search_backend,
            (start, stop),
        )
        parts = _parts(queries.ids, known, passages.ids, (rows, scores), depth, keep_own_id)
        if config.question:
            hits = [hit for part in parts for hit in _hits(config, part, passages)]
            return Found({}, len(queries.ids), stop - start, hits)
        if judge is not None and judge.needs_rows:
            parts = (judge.with_corpus_rows(part, passages.ids) for part in parts)
        return Found(_finish(config, parts, judge), len(queries.ids), stop - start)


def _hits(config: SearchConfig, part: RankingPart, passages: Vectors) -> Iterator[Hit]:
    """The passages of some questions, with the texts of the collection."""
    dataset = _dataset(config, passages)
    corpus = open_collection(dataset).corpus() if dataset else None
    rows = corpus_rows(corpus, passages.ids, part.rows) if corpus else part.rows
    for (number, ranked), of_question in zip(part.ranking.items(), rows, strict=True):
        found = of_question[: len(ranked)]
        texts = corpus.passages(found) if corpus else [Passage(name, "", "") for name, _ in ranked]
        for rank, ((name, score), passage) in enumerate(zip(ranked, texts, strict=True), start=1):
            question = config.question[int(number)]
            yield Hit(question, rank, score, name, passage.title, passage.text)


def _dataset(config: SearchConfig, passages: Vectors | None) -> str | None:
    """The collection that is named, or else that of the vectors."""
    about = passages.manifest if passages else None
    return config.named_dataset()[0] or (about.dataset if about else None)


def _open_passages(config: SearchConfig) -> Vectors:
    """The vectors that are searched.

    Raises:
        UsageError: there are none, or they are of queries.
        DataError: a file is damaged or missing.
    """
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
    return passages


def _parts(
    query_ids: Sequence[str],
    known: Sequence[Query],
    ids: pa.ChunkedArray,
    found: tuple[np.ndarray, np.ndarray],
    depth: int,
    keep_own_id: bool,
) -> Iterator[RankingPart]:
    """Rankings of some queries at a time, with rows of the vectors."""
    excluded = {query.id: query.excluded for query in known if query.excluded}
    for first in range(0, len(query_ids), QUERIES_PER_PART):
        names = query_ids[first : first + QUERIES_PER_PART]
        queries = [Query(name, "", excluded=excluded.get(name, ())) for name in names]
        rows, scores = (values[first : first + QUERIES_PER_PART] for values in found)
        rows, scores = without_excluded(queries, ids, rows, scores, keep_own_id)
        ranking = NamedRanking(queries, ids, rows, scores, depth)
        yield RankingPart(ranking, rows[:, :depth])


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
    groups = torch.from_numpy(queries).to(target).split(queries_per_merge(k))
    best = [TopK(len(group), k, ranks, target) for group in groups]
    with progress_bar(stop - start, "searching", "passages") as bar:
        for first, vectors in passages.chunks(start, stop, passages_per_chunk(k, target)):
            chunk = torch.from_numpy(vectors).to(target)
            chunk_rows = torch.arange(first, first + len(chunk), device=target)
            for group, top in zip(groups, best, strict=True):
                top.update(group, chunk, chunk_rows, find)
            bar.update(len(chunk))
    return stacked(best)


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
    split = _split(config, None, None)
    ranking = merged_ranking(config.sources, _depth(config, split is not None))
    with _judge(config, split) as judge:
        has_rows = judge is not None and split is not None and judge.needs_rows
        rows = ranking_rows(split.corpus, ranking) if has_rows and split else NO_ROWS
        measures = _finish(config, [RankingPart(ranking, rows)], judge)
    return Found(measures, len(ranking), 0)


def _judge(config: SearchConfig, split: _Split | None) -> AbstractContextManager[Judge | None]:
    """What measures, where there is something to measure with.

    Raises:
        UsageError: results are to be written, and nothing names a collection; or the split lacks
            judgements or answers that the measures need.
    """
    if split is None:
        if config.writes_results:
            raise UsageError(
                f"{config.output}: results have the texts of questions and passages; give "
                "--dataset, or another --format"
            )
        return nullcontext()
    measures = parse_measures(config.measures)
    if not split.topics.qrels and "measures" not in config.model_fields_set:
        measures = parse_measures(DEFAULT_OF_ANSWERS)
    check_topics(split.location, split.topics, measures)
    return Judge(split.corpus, split.topics, measures, config.match, config.writes_results)


def _finish(
    config: SearchConfig, parts: Iterable[RankingPart], judge: Judge | None
) -> dict[Measure, float]:
    """Write a ranking and measure it, some queries at a time."""

    def measured() -> Iterator[Ranking]:
        for part in parts:
            if judge is not None:
                judge.measure(part)
            yield part.ranking

    if config.output is not None and judge is not None and config.writes_results:
        results = (result for part in parts for result in judge.results(part))
        write_results(config.output, results, scores_as_text=config.layout == "dpr")
    elif config.output is not None:
        write_ranking(config.output, measured(), config.layout)
    elif judge is not None:
        for _ in measured():
            pass
    return {} if judge is None else judge.means()


def _depth(config: SearchConfig, is_judged: bool) -> int:
    if config.question:
        return config.depth or DEPTH_OF_QUESTIONS
    usual = RESULTS_DEPTH if config.writes_results else UNJUDGED_DEPTH
    if is_judged:
        deepest = check_depth(parse_measures(config.measures), config.depth)
        return max(deepest, 0 if config.depth or config.output is None else usual)
    return config.depth or usual


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
            about.texts_digest if about and about.kind == "queries" else None,
        )
    name = config.encoder or (passages.manifest.encoder if passages.manifest else None)
    if name is None:
        raise UsageError(
            "give --queries, the vectors of the queries; or --encoder and --dataset, whose queries "
            "are encoded now"
        )
    dataset, split = _dataset(config, passages), None
    topics = Topics([Query(str(n), text) for n, text in enumerate(config.question)], {})
    if not config.question:
        if not dataset:
            raise UsageError("give --dataset, whose queries are searched for")
        collection = open_collection(dataset)
        split = chosen_split(collection, config.split)
        topics = collection.topics(split)
    encoder = open_encoder(name, config.tracking_uri, trust_remote_code=config.trust_remote_code)
    digest = encoder_digest(encoder)
    texts = query_texts(encoder, topics)
    device = resolve_device(config.device)
    dtype = passages.manifest.dtype if passages.manifest else config.dtype
    if config.dtype != "auto":
        dtype = config.dtype
    target = texts.encoder.eval().to(device, torch_dtype(resolve_dtype(dtype, device)))
    vectors = encode_all(target, texts.table, texts.pad_id, "query").cpu().numpy()
    return _QueryVectors(texts.ids.to_pylist(), vectors, digest, dataset, split)


def _split(
    config: SearchConfig, queries: _QueryVectors | None, passages: Vectors | None
) -> _Split | None:
    """The queries to measure with; None where nothing names a collection that has some."""
    if config.question:
        return None
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
    split = chosen_split(collection, split)
    topics = collection.topics(split)
    told = queries.texts_digest if queries else None
    if told and told != topics.digest and not topics.qrels:
        raise UsageError(
            f"{config.queries} has vectors of other questions than {dataset}/{split}, which are "
            "told apart by their places in a file; encode these, or name the split that was encoded"
        )
    unknown = set(queries.ids) - {query.id for query in topics.queries} if queries else set()
    if queries and len(unknown) == len(queries.ids):
        raise UsageError(
            f"no query of {config.queries} is judged in {dataset}, such as {quoted(min(unknown))}"
        )
    return _Split(f"{dataset}/{split}", collection.corpus(), topics)
