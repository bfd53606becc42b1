"""Hard negatives for the training queries of a collection, written as a training file."""

from __future__ import annotations

import difflib
import gzip
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from mlflow_dr.collection.catalogue import open_collection, open_examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.formats import Collection, Examples
from mlflow_dr.collection.records import Example, Query
from mlflow_dr.errors import DataError, UnavailableError, UsageError, quoted
from mlflow_dr.files import atomic_write
from mlflow_dr.mining.queries import ExcludedPassages, MiningQueries, mining_queries
from mlflow_dr.mining.rule import Rule, choose
from mlflow_dr.retrieval.answers import STRING, AnswerFinder
from mlflow_dr.retrieval.bm25 import WORDS, Bm25Retriever, Bm25Settings, warn_of_no_matches
from mlflow_dr.retrieval.ranking import Retriever, SearchResult

log = logging.getLogger(__name__)

TRAIN = "train"
BM25 = "bm25"


@dataclass(frozen=True)
class MiningConfig:
    """What `mlflow-dr mine` was asked.

    Attributes:
        dataset: the collection whose passages are searched.
        train_dir: the training examples that are mined for: a file, folder or name; the
            collection's own when None.
        output: the file to write; `.gz` packs it.
        miner: `bm25`, or an encoder: a directory, a hub name or `models:/<id>`.
        rule: what makes a negative.
        exclude_answers: leave out passages that hold one of the query's answers, where the
            collection has answers.
        match: what answers are: a `string`, or a `regex`, a regular expression.
        bm25: how BM25 makes and weighs terms.
        force: replace a file that is there.
        device: see `resolve_device`; so much for an encoder only, like the rest.
        dtype: see `resolve_dtype`.
        trust_remote_code: whether code in the encoder's directory may run.
        tracking_uri: where `models:/` is looked up.
    """

    dataset: str
    output: Path
    train_dir: str | None = None
    miner: str = BM25
    rule: Rule = field(default_factory=Rule)
    exclude_answers: bool = True
    match: str = STRING
    bm25: Bm25Settings = field(default_factory=Bm25Settings)
    force: bool = False
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    tracking_uri: str | None = None


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

    def figures(self) -> dict[str, float]:
        """The counts, by the names that they have as metrics."""
        return {
            "mined/queries": self.queries,
            "mined/negatives": self.negatives,
            "mined/queries_with_fewer": self.short,
            "mined/queries_without": self.without,
            "mined/seconds": self.seconds,
        }

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
    `positive_document_ids`, `negative_document_ids`; extra_scores `positive_scores` and
    `negative_scores` (the miner's), and `answers` where the collection has them.

    Raises:
        UsageError: an unknown dataset, encoder or device, or a file that is there already.
        DataError: the collection's files are damaged, it has no training examples, the search
            for a regular expression takes too long, or nothing is found for any query.
        CheckpointError: the encoder's files are damaged, or it gives NaN.
    """
    start = time.perf_counter()
    _check_output(request)
    collection = open_collection(request.dataset)
    miner = _miner(request)
    corpus = collection.corpus()
    questions = mining_queries(_examples(request, collection), corpus)
    if questions.unknown or questions.left_out:
        log.warning(
            "%s: the corpus lacks %d positives; %d examples are left out, without any positive "
            "in the corpus or without text",
            request.train_dir or request.dataset,
            questions.unknown,
            questions.left_out,
        )
    finder = AnswerFinder(corpus, match=request.match)
    if request.exclude_answers:
        _check_answers(finder, questions)
    most = max(len(rows) for rows in questions.positives)
    # what is barred makes room for others; a query with very many positives does not rule the depth
    k = request.rule.depth + min(most, request.rule.depth)
    found = miner.search(corpus, questions.queries, k, questions.positives)
    mined = MiningResult(request.output)
    barred = ExcludedPassages(questions, corpus, _judged(request, collection, corpus))
    with _lines(request.output) as file:
        for record in _records(request, corpus, questions, barred, found, finder, mined):
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        _check_found(request, mined)
    mined.seconds = time.perf_counter() - start
    return mined


def _check_answers(finder: AnswerFinder, questions: MiningQueries) -> None:
    """Warn of answers that are no regular expressions now, not after hours of searching."""
    faults = [
        f"query {quoted(query.id)}, {fault}"
        for query in questions.queries
        for fault in finder.faults(query.answers)
    ]
    if faults:
        log.warning(
            "%d answers are not regular expressions, so that no passage holds them (such as %s)",
            *(len(faults), faults[0]),
        )


@contextmanager
def _naming(query: Query) -> Iterator[None]:
    """An error about answers says whose they are."""
    try:
        yield
    except DataError as error:
        raise DataError(f"query {quoted(query.id)}: {error}") from error


def _check_found(request: MiningConfig, mined: MiningResult) -> None:
    """Warn of queries without negatives; no file is written where the search found nothing at all.

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
        raise UsageError(f"{request.output}: is there already; --force replaces it")
    if not output.parent.is_dir():
        raise UsageError(f"{request.output}: the folder {output.parent} does not exist")


def _examples(request: MiningConfig, collection: Collection) -> Examples:
    if request.train_dir is None:
        return collection.examples()
    return open_examples(request.train_dir, collection.corpus)


def _judged(request: MiningConfig, collection: Collection, corpus: Corpus) -> Iterator[Example]:
    """What a training file may leave out of what is relevant to its queries."""
    if request.train_dir is not None and TRAIN in collection.splits:
        examples = JudgedExamples(collection.topics(TRAIN), corpus)
        yield from (examples[index] for index in range(len(examples)))


def _miner(request: MiningConfig) -> Retriever:
    if request.miner.lower() == BM25:
        return Bm25Retriever(request.bm25)
    # only here: BM25 needs no torch, which takes seconds to import
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.retrieval.dense import DenseRetriever
    from mlflow_dr.tracking.encoders import encoder_errors, local_encoder

    name = request.miner
    try:
        with local_encoder(name, request.tracking_uri) as directory, encoder_errors(name):
            encoder = load_encoder(directory, trust_remote_code=request.trust_remote_code)
    except (UsageError, UnavailableError) as error:
        hint = f"did you mean {BM25}? " if difflib.get_close_matches(name.lower(), [BM25]) else ""
        if isinstance(error, UnavailableError) and not hint:
            raise
        raise UsageError(f"cannot mine with {name!r}: {hint}{error}") from error
    return DenseRetriever(encoder, request.device, request.dtype)


def _records(
    request: MiningConfig,
    corpus: Corpus,
    questions: MiningQueries,
    barred: ExcludedPassages,
    batches: Iterator[SearchResult],
    finder: AnswerFinder,
    mined: MiningResult,
) -> Iterator[dict[str, Any]]:
    """One line for each query; what is counted is counted in `mined`."""
    index = 0
    for found in batches:
        named = NamedPassages(corpus, found, questions.positives[index : index + len(found.rows)])
        for place in range(len(found.rows)):
            query = questions.queries[index]
            rows, scores = named.ranked(place)
            mined.unmatched += not rows
            with _naming(query):
                sought = finder.sought(query.answers) if request.exclude_answers else ()
                chosen = choose(
                    request.rule,
                    query.id,
                    rows,
                    scores,
                    barred.places(index, rows),
                    float(found.extra_scores[place].min()),
                    lambda row, sought=sought: finder.holds(row, sought),  # type: ignore[misc]
                    mined.left_out,
                )
            _count(mined, len(chosen), request.rule.negatives)
            yield record_of(query, named, place, chosen)
            index += 1


def _count(mined: MiningResult, negatives: int, wanted: int) -> None:
    mined.queries += 1
    mined.negatives += negatives
    mined.short += 0 < negatives < wanted
    mined.without += negatives == 0


@contextmanager
def _lines(path: Path) -> Iterator[IO[bytes]]:
    """A file that is whole or not there, packed where its name ends in `.gz`."""
    with atomic_write(path) as partial, partial.open("wb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        # without a time and a name inside, so that equal contents are equal files
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            yield packed  # type: ignore[misc]


class NamedPassages:
    """What was found for some queries, with ids looked up for all of them at once."""

    def __init__(self, corpus: Corpus, found: SearchResult, positives: list[np.ndarray]) -> None:
        used = np.unique(np.concatenate([found.rows.ravel(), *positives]))
        used = used[used >= 0]
        ids = corpus.ids.take(used).to_pylist()
        self._ids = dict(zip(used.tolist(), ids, strict=True))
        self._found = found
        self._positives = positives

    def ranked(self, place: int) -> tuple[list[int], list[float]]:
        """Rows and scores of one query's ranking, without its empty places."""
        rows = self._found.rows[place]
        number = int((rows >= 0).sum())
        return rows[:number].tolist(), self._found.scores[place, :number].tolist()

    def positives(self, place: int) -> tuple[list[str], np.ndarray]:
        """Ids and scores of one query's positives."""
        ids = [self._ids[row] for row in self._positives[place].tolist()]
        return ids, self._found.extra_scores[place]

    def negatives(self, place: int, chosen: list[int]) -> tuple[list[str], np.ndarray]:
        """Ids and scores at these places of one query's ranking."""
        ids = [self._ids[row] for row in self._found.rows[place, chosen].tolist()]
        return ids, self._found.scores[place, chosen]


def record_of(query: Query, named: NamedPassages, place: int, chosen: list[int]) -> dict[str, Any]:
    """The line of one query.

    Args:
        query: the query.
        named: what was found for it and for others.
        place: which of them it is.
        chosen: places of its negatives in its ranking.
    """
    positive_ids, positive_scores = named.positives(place)
    negative_ids, negative_scores = named.negatives(place, chosen)
    answers = {"answers": list(query.answers)} if query.answers else {}
    return {
        "query_id": query.id,
        "query_text": query.text,
        **answers,
        "positive_document_ids": positive_ids,
        "negative_document_ids": negative_ids,
        "positive_scores": _plain(positive_scores),
        "negative_scores": _plain(negative_scores),
    }


def _plain(scores: np.ndarray) -> list[float]:
    """fp32 scores in the seven digits that they have."""
    return [float(f"{score:.7g}") for score in scores.tolist()]
