"""One encoder, one collection, one report. Nothing here knows of checkpoints or of MLflow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.interface import Collection
from mlflow_dr.collection.records import Topics
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tables import corpus_tokens
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.engines.devices import DTYPES, resolve_device, resolve_dtype
from mlflow_dr.retrieval.dense import search_corpus
from mlflow_dr.retrieval.measures import Measure, check_depth, mean_values, measure_ranking
from mlflow_dr.retrieval.ranking import Ranking, named_ranking
from mlflow_dr.stores.token_table import TokenTable


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

    measures: dict[str, float]
    per_query: dict[str, dict[str, float]]
    ranking: Ranking
    seconds: float
    passages: int
    dtype: str


class Prepared:
    """A split of a collection with everything that does not depend on the weights.

    Args:
        collection: where passages, queries and judgements come from.
        split: whose queries are put.
    """

    def __init__(self, collection: Collection, split: str) -> None:
        self.collection = collection
        self.split = split
        self._tables: dict[str, TokenTable] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The passages."""
        return self.collection.corpus()

    @cached_property
    def topics(self) -> Topics:
        """The judged queries."""
        return self.collection.topics(self.split)

    @cached_property
    def tie_ranks(self) -> np.ndarray:
        """Each passage's place among equal scores, `(n_passages,) int64`."""
        return self.corpus.tie_ranks()

    def tokens(self, tokenizing: Tokenizing) -> TokenTable:
        """The corpus as token ids: made once per tokenizer and settings, then mapped."""
        key = tokenizing.passage_digest()
        if key not in self._tables:
            self._tables[key] = corpus_tokens(self.corpus, tokenizing)
        return self._tables[key]


def evaluate(
    encoder: Encoder, prepared: Prepared, settings: Settings, quiet: bool = False
) -> Report:
    """Encode queries and corpus, search exactly, measure.

    Raises:
        CheckpointError: the encoder gives NaN.
        DeviceError: no such device.
        UsageError: a measure looks deeper than the depth.
    """
    depth = check_depth(settings.measures, settings.depth)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    tokenizing = Tokenizing(encoder.tokenizer, encoder.settings)
    table, topics = prepared.tokens(tokenizing), prepared.topics

    start = time.perf_counter()
    found = search_corpus(
        encoder.eval().to(device, DTYPES[dtype]),
        tokenizing,
        topics.queries,
        table,
        prepared.tie_ranks,
        depth + (0 if settings.keep_own_id else 1),
        quiet=quiet,
    )
    ranking = named_ranking(
        topics.queries, prepared.corpus, found.rows, found.scores, depth, settings.keep_own_id
    )
    per_query = measure_ranking(ranking, topics.qrels, settings.measures)
    seconds = time.perf_counter() - start
    return Report(mean_values(per_query), per_query, ranking, seconds, len(table), dtype)
