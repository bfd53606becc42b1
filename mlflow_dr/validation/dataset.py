"""The data of an evaluation: a split of a collection, whose corpus is tokenised once."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.catalogue import Collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.rank_pool import RankPool
from mlflow_dr.collection.records import Topics
from mlflow_dr.devices import AUTO, resolve_devices, resolve_dtype
from mlflow_dr.encoder.token_table import corpus_tokens, subset_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.opening import LOCAL
from mlflow_dr.errors import UsageError
from mlflow_dr.files import digest_of
from mlflow_dr.retrieval.dense import SearchRequest
from mlflow_dr.retrieval.estimate import FEW_IN_SAMPLE, share_for
from mlflow_dr.retrieval.matching import AnswerMatcher
from mlflow_dr.retrieval.measures import OF_POOL, answers_depth, check_topics, of_pool
from mlflow_dr.retrieval.ranking import check_ranking_ids
from mlflow_dr.stores.token_table import TokenTable
from mlflow_dr.subsets.spec import SubsetSpec
from mlflow_dr.subsets.strategies import SubsetSources
from mlflow_dr.subsets.subset import Subset, make_subset
from mlflow_dr.validation.validations import EvalConfig

log = logging.getLogger(__name__)


class CorpusTokens:
    """The corpus of a collection and its token tables, which do not depend on the weights.

    Args:
        collection: whose corpus.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._tables: dict[tuple[str, bytes | None], TokenTable] = {}
        self._matchers: dict[str, AnswerMatcher] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The passages."""
        return self.collection.corpus()

    @cached_property
    def tie_ranks(self) -> np.ndarray:
        """Each passage's rank among equal scores, `(n_passages,) int64`."""
        return self.corpus.tie_ranks()

    def matcher(self, match: str) -> AnswerMatcher:
        """Finds answers in the corpus; its tokens are made once for all checkpoints."""
        if match not in self._matchers:
            self._matchers[match] = AnswerMatcher(self.corpus, match)
        return self._matchers[match]

    def table(self, text_tokenizer: TextTokenizer, rows: np.ndarray | None = None) -> TokenTable:
        """The corpus, or these rows of it, as token ids: made once per tokenizer and settings."""
        key = text_tokenizer.passage_digest(), None if rows is None else rows.tobytes()
        if key not in self._tables:
            self._tables[key] = (
                corpus_tokens(self.corpus, text_tokenizer)
                if rows is None
                else subset_tokens(self.corpus, rows, text_tokenizer)
            )
        return self._tables[key]


class EvalDataset:
    """The queries, judgements and passages that an encoder is evaluated on.

    Args:
        collection: where passages, queries and judgements come from.
        split: whose queries are searched for.
        tokens: the collection's corpus, if another split has opened it already.
        subset: what is searched instead of the whole corpus.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        tokens: CorpusTokens | None = None,
        subset: Subset | None = None,
    ) -> None:
        self.collection = collection
        self.split = split
        self.tokens = tokens or CorpusTokens(collection)
        self.subset = subset
        self._has_warned = False

    def on_subset(self, spec: SubsetSpec, settings: EvalConfig, **options: Any) -> EvalDataset:
        """The same queries on a subset of the corpus.

        Args:
            spec: the subset.
            settings: device, number format and search back end of the encoders that choose it; with
                Ray, they run on this machine all the same.
            options: other fields of `SubsetSources`: where checkpoints are found.

        Raises:
            DeviceError: no such device, or it does not have the number format.
            UsageError: a term of the subset cannot be chosen here.
        """
        is_local = settings.engine == LOCAL
        devices = resolve_devices(settings.device if is_local else AUTO)
        if settings.target_error is not None:
            percent = 100 * share_for(settings.target_error, len(self.topics.queries))
            spec = spec.sized(float(f"{percent:.2g}"))
            log.info("--target-error %g: the sample is %s", settings.target_error, spec.shown)
        sources = SubsetSources(
            self.corpus,
            self.topics,
            device=",".join(map(str, devices)),
            dtype=resolve_dtype(settings.dtype if is_local else AUTO, devices[0]),
            search_backend=settings.search_backend,
            **options,
        )
        subset = make_subset(spec, sources)
        if settings.estimate and len(subset.sample) < FEW_IN_SAMPLE:
            log.warning(
                "%s: the sample adds only %d passages to those that are judged or chosen by other "
                "terms; with fewer than %d, estimates are rough",
                *(spec.shown, len(subset.sample), FEW_IN_SAMPLE),
            )
        return EvalDataset(self.collection, self.split, self.tokens, subset)

    @property
    def corpus(self) -> Corpus:
        """The passages."""
        return self.tokens.corpus

    @cached_property
    def topics(self) -> Topics:
        """The judged queries."""
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

    def warn_of_own_ids(self) -> None:
        """Warn, once, of relevant passages that are left out because they have their query's id."""
        if self._has_warned:
            return
        self._has_warned = True
        qrels = self.topics.qrels
        relevant = [query for query, judged in qrels.items() if judged.get(query, 0) > 0]
        if relevant:
            log.warning(
                "%s/%s: for %d queries (%r, ...) the passage with the query's id is relevant, and "
                "is left out as in BEIR; if the ids of queries and passages are unrelated, use "
                "--keep-own-id",
                *(self.collection.name, self.split, len(relevant), relevant[0]),
            )

    def check_measures(self, settings: EvalConfig) -> None:
        """Refuse measures of judgements or answers that the split does not have.

        Raises:
            UsageError: with the measures that it can be measured by.
        """
        if of_pool(settings.measures):
            self.rank_pool  # noqa: B018 - refuses
            return
        check_topics(f"{self.collection.name}/{self.split}", self.topics, settings.measures)

    @cached_property
    def rank_pool(self) -> RankPool:
        """The questions and passages of average rank.

        Raises:
            UsageError: the collection has none, or a subset is searched.
        """
        make = getattr(self.collection, "rank_pool", None)
        if make is None or self.subset is not None:
            raise UsageError(
                f"{' and '.join(OF_POOL)} are measured on all passages of training examples: name "
                "the file as pool:FILE, without a subset"
            )
        pool: RankPool = make()
        return pool

    def answers_config(self, settings: EvalConfig) -> dict[str, object]:
        """What values that are measured by answers depend on; empty if no measure needs them."""
        if not answers_depth(settings.measures):
            return {}
        return {"match": settings.match, "answers": self.topics.answers_digest}

    def keeps_own_id(self, settings: EvalConfig) -> bool:
        """Whether a passage that has its query's id is kept.

        Leaving it out is a convention of judged queries; other questions are numbered in a file.
        """
        return settings.keep_own_id or not self.topics.qrels

    def check_ids(self) -> None:
        """Refuse ids that a ranking file cannot hold.

        Raises:
            DataError: the id of a query, or of a passage that is searched, has white space.
        """
        check_ranking_ids(pa.array([query.id for query in self.topics.queries], pa.string()))
        ids = self.corpus.ids
        check_ranking_ids(ids if self.subset is None else ids.take(pa.array(self.subset.rows)))

    def search(self, k: int) -> SearchRequest:
        """The search for k passages of each query."""
        subset = self.subset
        if subset is None:
            return SearchRequest(self.topics.queries, k)
        return SearchRequest(self.topics.queries, k, subset.rows, subset.candidates)
