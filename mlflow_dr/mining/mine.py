"""Hard negatives for the training queries of a collection, written as a training file."""

from __future__ import annotations

import difflib
import gzip
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

import msgspec
import numpy as np
from pydantic import Field, model_validator

from mlflow_dr.collection.catalogue import Collection, Examples, open_collection, open_examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.records import Example, Query
from mlflow_dr.config import Config, Flag
from mlflow_dr.errors import DataError, UnavailableError, UsageError, quoted
from mlflow_dr.fields import (
    LARGEST,
    Count,
    Devices,
    Dtype,
    File,
    Force,
    Match,
    SearchBackendName,
    Seed,
    TrackingUri,
    TrustRemoteCode,
)
from mlflow_dr.files import atomic_write
from mlflow_dr.mining.rule import ExcludedPassages, MiningQueries, Rule, choose, mining_queries
from mlflow_dr.retrieval.answers import AnswerFinder, warn_of_faults
from mlflow_dr.retrieval.bm25 import WORDS, Bm25Retriever, Bm25Settings, warn_of_no_matches
from mlflow_dr.retrieval.ranking import Retriever, SearchResult

log = logging.getLogger(__name__)

TRAIN = "train"
BM25 = "bm25"


class MiningConfig(Config):
    """`mlflow-dr mine`: what is searched for which queries, and what makes a negative."""

    dataset: str
    """demo, msmarco, a folder, irds:<id>, a hub name such as mteb/scifact, or what else
    `mlflow-dr datasets` lists."""
    output: File
    """The training file to write, as JSON lines; compressed if it ends in .gz."""
    train_dir: str | None = None
    """Training examples to mine for: a file, folder or name (default: the dataset's own)."""
    force: Force = False
    miner: Annotated[str, Flag("--with")] = BM25
    """bm25, or an encoder: a directory, a hub name, or models:/... of a published one."""
    depth: Annotated[Count, Flag("--depth", "--range-max")] = 100
    """How many passages of a ranking to look at, not counting positives."""
    range_min: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Skip this many passages at the top of a ranking."""
    negatives: Count = 30
    """Negatives per query, at most."""
    sample: Literal["top", "random"] = "top"
    """Take the highest-ranked candidates, or sample at random."""
    seed: Seed = 0
    margin: float | None = None
    """A negative scores at least this much less than the positive."""
    relative_margin: Annotated[float | None, Field(ge=0, le=1)] = None
    """The same as a share of the positive's score (NV-Retriever: 0.05)."""
    max_score: float | None = None
    """A negative scores at most this."""
    min_score: float | None = None
    """A negative scores at least this."""
    exclude_answers: Annotated[bool, Flag(off="--keep-answers")] = True
    """Exclude passages that contain an answer, if the collection has answers."""
    match: Match = "string"
    k1: float = 0.9
    """BM25's k1."""
    b: float = 0.4
    """BM25's b."""
    language: str = "english"
    """BM25's stop words and stemmer (Snowball's languages), or none."""
    device: Devices = "auto"
    dtype: Dtype = "auto"
    search_backend: SearchBackendName = "auto"
    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        self.rule, self.bm25  # noqa: B018 - refuse what makes no sense together
        return self

    @property
    def rule(self) -> Rule:
        """What makes a negative.

        Raises:
            UsageError: values that contradict each other.
        """
        return Rule(**{field.name: getattr(self, field.name) for field in fields(Rule)})

    @property
    def bm25(self) -> Bm25Settings:
        """How BM25 makes and weighs terms.

        Raises:
            UsageError: a value out of range.
        """
        return Bm25Settings(self.k1, self.b, self.language)


@dataclass
class MiningResult:
    """What was mined.

    Attributes:
        output: the file.
        queries: how many lines it has.
        negatives: how many negatives, over all queries.
        short: queries with fewer negatives than asked for, but some.
        without: queries with none.
        unmatched: queries for which the search found no passage.
        left_out: passages that the search found and the rule left out, by reason.
        seconds: wall time.
    """

    output: Path
    queries: int = 0
    negatives: int = 0
    short: int = 0
    without: int = 0
    unmatched: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def summary(self, wanted: int) -> list[str]:
        """What was mined, in a few lines; `wanted` negatives were asked for."""
        mean = self.negatives / max(1, self.queries)
        return [
            f"{self.queries} queries with {mean:.1f} negatives on average",
            f"fewer than {wanted} negatives: {self.short} queries; none: {self.without} queries",
            f"passages left out: {self.reasons()}",
            f"wrote {self.output} in {self.seconds:.1f} s",
        ]

    def reasons(self) -> str:
        """How many passages were left out, and why."""
        counts = [f"{number} {reason}" for reason, number in self.left_out.items() if number]
        return ", ".join(counts) or "none"


def mine(request: MiningConfig) -> MiningResult:
    """Search for every training query, choose its negatives, and write them.

    The file has a line of JSON for each query, under Tevatron's names: `query_id`, `query_text`,
    `positive_document_ids`, `negative_document_ids`, `positive_scores` and `negative_scores` (the
    miner's), and `answers` if the collection has them.

    Raises:
        UsageError: an unknown dataset, encoder or device, or a file that exists already.
        DataError: the collection's files are damaged, it has no training examples, the search
            for a regular expression takes too long, or nothing is found for any query.
        CheckpointError: the encoder's files are damaged, or it gives NaN.
    """
    start = time.perf_counter()
    _check_output(request)
    collection = open_collection(request.dataset)
    miner = _miner(request)
    corpus = collection.corpus()
    queries = mining_queries(_examples(request, collection), corpus)
    if queries.unknown or queries.left_out:
        log.warning(
            "%s: the corpus lacks %d positives; %d examples are left out, without any positive "
            "in the corpus or without text",
            request.train_dir or request.dataset,
            queries.unknown,
            queries.left_out,
        )
    finder = AnswerFinder(corpus, match=request.match)
    if request.exclude_answers:
        warn_of_faults(finder, queries.queries)
    most = max(len(rows) for rows in queries.positives)
    # excluded passages make room for others; a query with many positives does not set k
    k = request.depth + min(most, request.depth)
    ranked = miner.search(corpus, queries.queries, k, queries.positives)
    mined = MiningResult(request.output)
    excluded = ExcludedPassages(queries, corpus, _judged(request, collection, corpus))
    with _lines(request.output) as file:
        for record in _records(request, corpus, queries, excluded, ranked, finder, mined):
            file.write(msgspec.json.encode(record) + b"\n")
        _check_found(request, mined)
    mined.seconds = time.perf_counter() - start
    return mined


@contextmanager
def _naming(query: Query) -> Iterator[None]:
    """Name the query in an error about its answers."""
    try:
        yield
    except DataError as error:
        raise DataError(f"query {quoted(query.id)}: {error}") from error


def _check_found(request: MiningConfig, mined: MiningResult) -> None:
    """Warn of queries without negatives; refuse to write a file if nothing was found.

    Raises:
        DataError: no passage was found for any query.
    """
    by_bm25 = request.miner.lower() == BM25
    if mined.unmatched == mined.queries:
        raise DataError(
            f"{request.dataset}: the search found no passage for any of {mined.queries} queries, "
            f"so that there are no negatives to write{f'. {WORDS}' if by_bm25 else ''}"
        )
    if by_bm25:
        warn_of_no_matches(mined.unmatched, mined.queries, "they get no negatives")
    if mined.negatives == 0:
        log.warning("no query has any negative (passages left out: %s)", mined.reasons())


def _check_output(request: MiningConfig) -> None:
    output = request.output.absolute()
    if output.is_dir():
        raise UsageError(f"{request.output}: is a folder; name a file to write")
    if output.exists() and not request.force:
        raise UsageError(f"{request.output}: exists already; --force replaces it")
    if not output.parent.is_dir():
        raise UsageError(f"{request.output}: the folder {output.parent} does not exist")


def _examples(request: MiningConfig, collection: Collection) -> Examples:
    if request.train_dir is None:
        return collection.examples()
    return open_examples(request.train_dir, collection.corpus)


def _judged(request: MiningConfig, collection: Collection, corpus: Corpus) -> Iterator[Example]:
    """Relevant passages of the collection that a training file may leave out."""
    if request.train_dir is not None and TRAIN in collection.splits:
        topics = collection.topics(TRAIN)
        if not topics.qrels:
            return
        examples = JudgedExamples(topics, corpus)
        yield from (examples[index] for index in range(len(examples)))


def _miner(request: MiningConfig) -> Retriever:
    if request.miner.lower() == BM25:
        return Bm25Retriever(request.bm25)
    # BM25 needs no torch, which takes seconds to import
    from mlflow_dr.retrieval.dense import DenseRetriever
    from mlflow_dr.tracking.encoders import open_encoder

    name = request.miner
    try:
        encoder = open_encoder(
            name, request.tracking_uri, trust_remote_code=request.trust_remote_code
        )
    except (UsageError, UnavailableError) as error:
        hint = f"did you mean {BM25}? " if difflib.get_close_matches(name.lower(), [BM25]) else ""
        if isinstance(error, UnavailableError) and not hint:
            raise
        raise UsageError(f"cannot mine with {name!r}: {hint}{error}") from error
    return DenseRetriever(encoder, request.device, request.dtype, request.search_backend)


def _records(
    request: MiningConfig,
    corpus: Corpus,
    queries: MiningQueries,
    excluded: ExcludedPassages,
    batches: Iterator[SearchResult],
    finder: AnswerFinder,
    mined: MiningResult,
) -> Iterator[dict[str, Any]]:
    """One line per query; the counts are added to `mined`."""
    rule, index = request.rule, 0
    for result in batches:
        positives = queries.positives[index : index + len(result.rows)]
        used = np.unique(np.concatenate([result.rows.ravel(), *positives]))
        used = used[used >= 0]
        ids = dict(zip(used.tolist(), corpus.ids.take(used).to_pylist(), strict=True))
        for ranked, scores, own, own_scores in zip(
            result.rows, result.scores, positives, result.extra_scores, strict=True
        ):
            query = queries.queries[index]
            rows = ranked[ranked >= 0].tolist()
            mined.unmatched += not rows
            with _naming(query):
                sought = finder.sought(query.answers) if request.exclude_answers else ()
                chosen = choose(
                    rule,
                    query.id,
                    rows,
                    scores.tolist(),
                    excluded.mask(index, rows),
                    float(own_scores.min()),
                    lambda row, sought=sought: finder.holds(row, sought),  # type: ignore[misc]
                    mined.left_out,
                )
            _count(mined, len(chosen), rule.negatives)
            yield {
                "query_id": query.id,
                "query_text": query.text,
                **({"answers": list(query.answers)} if query.answers else {}),
                "positive_document_ids": [ids[row] for row in own.tolist()],
                "negative_document_ids": [ids[rows[rank]] for rank in chosen],
                "positive_scores": _rounded(own_scores),
                "negative_scores": _rounded(scores[chosen]),
            }
            index += 1


def _count(mined: MiningResult, negatives: int, wanted: int) -> None:
    mined.queries += 1
    mined.negatives += negatives
    mined.short += 0 < negatives < wanted
    mined.without += negatives == 0


@contextmanager
def _lines(path: Path) -> Iterator[IO[bytes]]:
    """A file that is complete or absent, compressed if its name ends in `.gz`."""
    with atomic_write(path) as partial, partial.open("wb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        # without a time and a name inside, so that equal contents are equal files
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            yield packed  # type: ignore[misc]


def _rounded(scores: np.ndarray) -> list[float]:
    """fp32 scores in the seven digits that they have."""
    return [float(f"{score:.7g}") for score in scores.tolist()]
