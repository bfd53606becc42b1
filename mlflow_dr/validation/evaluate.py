"""One encoder, one collection, one report. Nothing here knows of checkpoints or of MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from mlflow_dr.cache import unchanged_cache
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Collection
from mlflow_dr.collection.records import Topics
from mlflow_dr.encoder.config import check_types
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_cache import corpus_tokens, subset_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.devices import resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.files import digest_of
from mlflow_dr.retrieval.dense import SearchRequest, dense_search, rows_to_encode
from mlflow_dr.retrieval.measures import Measure, check_depth, mean_values, measure_ranking
from mlflow_dr.retrieval.ranking import Ranking, SearchResult, check_trec_ids, named_ranking
from mlflow_dr.stores.token_table import TokenTable
from mlflow_dr.subsets.subset import Subset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How an encoder is evaluated.

    Attributes:
        measures: what is measured.
        depth: passages kept for each query; the largest cut-off when None.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        keep_own_id: keep a passage whose id is the query's id.
    """

    measures: tuple[Measure, ...]
    depth: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    keep_own_id: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        measures: measure -> mean over queries.
        per_query: query id -> measure -> value.
        ranking: query id -> (passage id, score).
        seconds: wall time of encoding, searching and measuring.
        passages: number of passages encoded.
        dtype: number format that was used.
    """

    measures: dict[Measure, float]
    per_query: dict[str, dict[Measure, float]]
    ranking: Ranking
    seconds: float
    passages: int
    dtype: str


class Searched:
    """The corpus of a collection with everything that does not depend on the weights.

    Args:
        collection: whose corpus.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._tables: dict[tuple[str, bytes | None], TokenTable] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The passages."""
        return self._collection.corpus()

    @cached_property
    def tie_ranks(self) -> np.ndarray:
        """Each passage's place among equal scores, `(n_passages,) int64`."""
        return self.corpus.tie_ranks()

    def tokens(self, text_tokenizer: TextTokenizer, rows: np.ndarray | None = None) -> TokenTable:
        """The corpus, or these rows of it, as token ids: made once per tokenizer and settings."""
        key = text_tokenizer.passage_digest(), None if rows is None else rows.tobytes()
        if key not in self._tables:
            self._tables[key] = (
                corpus_tokens(self.corpus, text_tokenizer)
                if rows is None
                else subset_tokens(self.corpus, rows, text_tokenizer)
            )
        return self._tables[key]


class Prepared:
    """A split of a collection with everything that does not depend on the weights.

    Args:
        collection: where passages, queries and judgements come from.
        split: whose queries are put.
        searched: the collection's corpus, where another split has it already.
        subset: what is searched instead of the whole corpus.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        searched: Searched | None = None,
        subset: Subset | None = None,
    ) -> None:
        self.collection = collection
        self.split = split
        self.searched = searched or Searched(collection)
        self.subset = subset
        self._told_own_ids = False

    @property
    def corpus(self) -> Corpus:
        """The passages."""
        return self.searched.corpus

    @cached_property
    def topics(self) -> Topics:
        """The judged queries that are put."""
        return self.subset.topics if self.subset else self.collection.topics(self.split)

    @cached_property
    def digest(self) -> str:
        """Of the passages that are searched, the queries and their judgements."""
        subset = [self.subset.digest] if self.subset else []
        return digest_of(self.corpus.digest, self.topics.digest, *subset)

    @property
    def n_passages(self) -> int:
        """How many passages are searched."""
        return len(self.subset or self.corpus)

    def tell_own_ids(self) -> None:
        """Say, once, that passages are left out which are relevant and have their query's id."""
        if self._told_own_ids:
            return
        self._told_own_ids = True
        qrels = self.topics.qrels
        relevant = [query for query, judged in qrels.items() if judged.get(query, 0) > 0]
        if relevant:
            log.warning(
                "%s/%s: of %d queries (%r, ...) the passage of the same id is judged relevant, and "
                "left out as BEIR does; if ids of queries and passages have nothing to do with one "
                "another, --keep-own-id keeps it",
                *(self.collection.name, self.split, len(relevant), relevant[0]),
            )

    def check_ids(self) -> None:
        """Refuse to search what no ranking can be written of.

        Raises:
            DataError: the id of a query, or of a passage that is searched, has white space.
        """
        check_trec_ids(pa.array([query.id for query in self.topics.queries], pa.string()))
        ids = self.corpus.ids
        check_trec_ids(ids if self.subset is None else ids.take(pa.array(self.subset.rows)))

    def search(self, k: int) -> SearchRequest:
        """What is sought, k passages deep."""
        subset = self.subset
        if subset is None:
            return SearchRequest(self.topics.queries, k)
        return SearchRequest(self.topics.queries, k, subset.rows, subset.candidates)


def evaluate(
    encoder: Encoder, prepared: Prepared, settings: Settings, quiet: bool = False
) -> Report:
    """Encode queries and corpus, search exactly, measure; see `evaluate_all`."""
    (report,) = evaluate_all(encoder, [(prepared, settings)], quiet)
    return report


@unchanged_cache()
def evaluate_all(
    encoder: Encoder, asked: Sequence[tuple[Prepared, Settings]], quiet: bool = False
) -> list[Report]:
    """Encode several sets of queries and their common corpus once, search exactly, measure each.

    Of subsets, what one of them holds is encoded, once, and each is searched by itself.

    Args:
        encoder: moved to the device, and into the number format.
        asked: splits of one corpus, on one device and in one number format.
        quiet: no progress bar.

    Returns:
        A report for each, with the seconds and passages of all together.

    Raises:
        CheckpointError: the encoder gives NaN.
        DataError: what is mapped from the cache was damaged meanwhile.
        DeviceError: no such device.
        UsageError: a measure looks deeper than the depth.
        ValueError: corpora, devices or formats differ.
    """
    searched, common = asked[0][0].searched, asked[0][1]
    for prepared, settings in asked:
        same = prepared.corpus.digest == searched.corpus.digest
        if not same or (settings.device, settings.dtype) != (common.device, common.dtype):
            raise ValueError("one pass is over one corpus, on one device and in one number format")
        if not settings.keep_own_id:
            prepared.tell_own_ids()
    depths = [check_depth(settings.measures, settings.depth) for _, settings in asked]
    device = resolve_device(common.device)
    dtype = resolve_dtype(common.dtype, device)
    text_tokenizer = TextTokenizer(encoder.tokenizer, encoder.settings)
    searches = [
        prepared.search(depth + (0 if settings.keep_own_id else 1))
        for depth, (prepared, settings) in zip(depths, asked, strict=True)
    ]
    rows = rows_to_encode(searches, len(searched.corpus))
    table = searched.tokens(text_tokenizer, rows)

    start = time.perf_counter()
    founds = dense_search(
        encoder.eval().to(device, torch_dtype(dtype)),
        text_tokenizer,
        searches,
        table,
        searched.tie_ranks,
        quiet=quiet,
    )
    results = [
        _measured(prepared, settings, depth, found)
        for (prepared, settings), depth, found in zip(asked, depths, founds, strict=True)
    ]
    seconds = time.perf_counter() - start
    passages = len(table) if rows is None else len(rows)
    return [
        Report(mean_values(per_query), per_query, ranking, seconds, passages, dtype)
        for per_query, ranking in results
    ]


def _measured(
    prepared: Prepared, settings: Settings, depth: int, found: SearchResult
) -> tuple[dict[str, dict[Measure, float]], Ranking]:
    """The values of each query, and the ranking that they are of."""
    topics = prepared.topics
    ranking = named_ranking(
        topics.queries, prepared.corpus, found.rows, found.scores, depth, settings.keep_own_id
    )
    return measure_ranking(ranking, topics.qrels, settings.measures), ranking
