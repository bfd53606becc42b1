"""The collections of ir_datasets by its ids, such as `beir/scifact` or `vaswani`.

Source: MacAvaney et al., Simplified Data Wrangling with ir_datasets, SIGIR 2021.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow_dr.collection.catalogue import Examples, check_split
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import JudgedExamples, cached_examples
from mlflow_dr.collection.qrels import EXPECTED, RELEVANCES, checked_topics
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query, Topics, unique
from mlflow_dr.errors import DataError, MissingExtraError, MlflowDrError, UsageError

log = logging.getLogger(__name__)

HOME_VARIABLE = "IR_DATASETS_HOME"
PROGRESS_MESSAGES = ("[", "download error", "Download failed")
# ir_datasets waits 15 s three times for each mirror by default. It counts retries anew whenever
# bytes arrive from a server that can resume, so fewer of them do not harm a long download.
LESS_PATIENCE = {"IR_DATASETS_DL_TRIES": "2", "IR_DATASETS_DL_TIMEOUT": "10"}
NO_BARS = {"IR_DATASETS_DL_DISABLE_PBAR": "true"}
RELEVANT = 1


class IrDataset:
    """One collection of ir_datasets; its files are downloaded when they are first read.

    Args:
        dataset_id: an id with queries and judgements (`beir/scifact/test`), or one whose members
            have them (`beir/scifact`, with splits `train` and `test`).

    Raises:
        UsageError: ir_datasets has no such id, or nothing to search under it.
        MissingExtraError: ir_datasets, or a library that this id needs, is not installed.
    """

    def __init__(self, dataset_id: str) -> None:
        self._id = dataset_id
        self.name = f"irds:{dataset_id}"
        page = dataset_id.split("/")[0]
        self.source = f"ir_datasets {dataset_id} (https://ir-datasets.com/{page}.html)"
        self._dataset = _loaded(dataset_id)
        if not self._dataset.has_docs():
            raise UsageError(f"{self.name} has no passages of its own; {self._members_to_name()}")

    @cached_property
    def splits(self) -> Sequence[str]:
        """The last part of the id if it has judgements, else its members that have some.

        Raises:
            UsageError: there is none.
        """
        if _is_judged(self._dataset):
            return [self._id.split("/")[-1]]
        passages = _docs_handler(self._dataset, self.name)
        members = [
            name.removeprefix(f"{self._id}/")
            for name, member in _members(self._id).items()
            if _is_judged(member) and _docs_handler(member, self.name) == passages
        ]
        if not members:
            raise UsageError(
                f"{self.name} has no judged queries over its passages; {self._members_to_name()}"
            )
        return members

    @property
    def has_negatives(self) -> bool:
        """Whether its training examples come with hard negatives; see `examples`."""
        judged = _is_judged(self._dataset)
        return bool(self._dataset.has_docpairs() or (judged and self._dataset.has_scoreddocs()))

    def corpus(self) -> Corpus:
        """The passages; ids that share them (such as the splits of one collection) share a cache.

        Raises:
            DataError: they cannot be downloaded or read, have no text, or repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        with reading(self.name):
            owner = library().docs_parent_id(self._id)
            # the published count: `docs_count()` opens stores, and changes when one is built
            count = self._dataset.docs_metadata().get("count")
        passages = unique("passage", lambda: _passages(self._dataset, self.name))
        return cached_corpus(f"irds:{owner}:{count}", passages, count, self.name)

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        judged_itself = _is_judged(self._dataset)
        return topics_of(self._id if judged_itself else f"{self._id}/{split}", self._corpus)

    def examples(self) -> Examples:
        """One example for each query; the negatives depend on what the id has.

        With `docpairs` (MS MARCO's triples) they are the second passages; with `scoreddocs`, the
        candidates that are not judged relevant. Without both, and for an id whose members are the
        splits, there are no negatives, and the positives are the relevant passages of the train
        split.

        Raises:
            UsageError: there are neither docpairs nor a train split.
            DataError: what is needed cannot be downloaded or read, or does not fit the corpus.
        """
        if self._dataset.has_docpairs():
            queries = {query.id: query for query in _queries(self._dataset, self.name)}
            raw = pair_examples(self._dataset, queries, self.name)
            return self._cached("docpairs", raw)
        split = next((split for split in self.splits if split.startswith("train")), "train")
        topics = self.topics(split)
        if _is_judged(self._dataset) and self._dataset.has_scoreddocs():
            return self._cached("scoreddocs", candidate_examples(self._dataset, topics, self.name))
        return JudgedExamples(topics, self._corpus)

    def _cached(self, kind: str, raw: Iterator[RawExample]) -> Examples:
        count = getattr(self._dataset, f"{kind}_metadata")().get("count")
        key = f"irds:{self._id}:{kind}:{count}:with answers"
        return cached_examples(key, raw, f"{self.name}, {kind}", self._corpus)

    def _members_to_name(self) -> str:
        members = [name for name, member in _members(self._id).items() if member.has_docs()]
        if not members:
            return "choose another id from https://ir-datasets.com"
        more = ", ..." if len(members) > 5 else ""
        return f"name a member: {', '.join(f'irds:{member}' for member in members[:5])}{more}"


def topics_of(dataset_id: str, corpus: Corpus) -> Topics:
    """The judged queries of an ir_datasets id, checked against a corpus that has its passage ids.

    Raises:
        UsageError: ir_datasets has no such id.
        DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
    """
    dataset = _loaded(dataset_id)
    location = f"ir_datasets {dataset_id}"
    return checked_topics(location, _queries(dataset, location), _qrels(dataset, location), corpus)


def _passages(dataset: Any, location: str) -> Iterator[tuple[str, Passage]]:
    with reading(f"{location}: the passages"):
        for doc in dataset.docs_iter():
            yield location, _passage(doc, location)


def _passage(doc: Any, location: str) -> Passage:
    """Title and text apart: `default_text()`, where it is needed, mostly starts with the title."""
    title = getattr(doc, "title", None) or ""
    text = getattr(doc, "text", None)
    if text is None:
        text = _default_text(doc, location).removeprefix(title).strip()
    return Passage(doc.doc_id, title, text)


def _queries(dataset: Any, location: str) -> Iterator[Query]:
    with reading(f"{location}: the queries"):
        for query in dataset.queries_iter():
            text = getattr(query, "text", None)
            if text is None:
                text = _default_text(query, location)
            yield Query(query.query_id, text, _answers(query))


def _answers(query: Any) -> Sequence[str]:
    """Short answers, which the queries of `dpr-w100` and `msmarco-qna` have."""
    answers = getattr(query, "answers", ())
    if isinstance(answers, list | tuple) and all(isinstance(answer, str) for answer in answers):
        return tuple(answers)
    return ()


def _qrels(dataset: Any, location: str) -> dict[str, dict[str, int]]:
    """Judgements; of several judgements of a passage (by subtopic), the highest is kept."""
    qrels: dict[str, dict[str, int]] = {}
    with reading(f"{location}: the judgements"):
        for qrel in dataset.qrels_iter():
            judged = qrels.setdefault(qrel.query_id, {})
            relevance = int(qrel.relevance)
            if relevance not in RELEVANCES:
                raise DataError(
                    f"{location}: query {qrel.query_id!r} and passage {qrel.doc_id!r} have "
                    f"relevance {relevance}; expected {EXPECTED}"
                )
            judged[qrel.doc_id] = max(relevance, judged.get(qrel.doc_id, relevance))
    return qrels


def _default_text(record: Any, location: str) -> str:
    if not hasattr(record, "default_text"):
        raise DataError(
            f"{location}: a {type(record).__name__} has no text to search with; its fields are "
            f"{', '.join(record._fields)}"
        )
    return str(record.default_text())


def _is_judged(dataset: Any) -> bool:
    return bool(dataset.has_docs() and dataset.has_queries() and dataset.has_qrels())


def _docs_handler(dataset: Any, location: str) -> Any:
    """What reads the passages; equal for ids that share their passages."""
    with reading(location):
        return dataset.docs_handler()


def _members(dataset_id: str) -> dict[str, Any]:
    """The datasets below an id, by their full ids."""
    below = [other for other in library().registry if other.startswith(f"{dataset_id}/")]
    return {member: _loaded(member) for member in below}


def _loaded(dataset_id: str) -> Any:
    """The dataset object of an id; nothing is read yet."""
    registry = library().registry
    with reading(f"irds:{dataset_id}"):
        try:
            return registry[dataset_id]
        except KeyError:
            close = difflib.get_close_matches(dataset_id, list(registry), n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise UsageError(
                f"ir_datasets has no {dataset_id!r}: {hint}https://ir-datasets.com lists its ids"
            ) from None


def library() -> Any:
    """The module ir_datasets, imported now.

    Raises:
        MissingExtraError: it is not installed.
        DataError: its home cannot be made.
    """
    for variable, value in (LESS_PATIENCE | ({} if sys.stderr.isatty() else NO_BARS)).items():
        os.environ.setdefault(variable, value)
    try:
        import ir_datasets
    except ImportError as error:
        raise MissingExtraError(
            f"collections named irds:<id> need ir_datasets ({error}); pip install ir_datasets"
        ) from error
    except OSError as error:
        raise DataError(
            f"ir_datasets cannot make its home ({error}); "
            f"set {HOME_VARIABLE} to a folder that can be written"
        ) from error
    return ir_datasets


def pair_examples(dataset: Any, queries: Mapping[str, Query], name: str) -> Iterator[RawExample]:
    """One example for each query of the docpairs: first passages against second passages.

    The pairs come in any order, so all are held until the last one is read, four bytes for each.
    """
    groups = _Groups()
    with reading(f"{name}: the docpairs"):
        for pair in dataset.docpairs_iter():
            groups.add(pair.query_id, pair.doc_id_a, pair.doc_id_b)
    for query_id, positives, negatives in groups:
        query = queries.get(query_id) or Query(query_id, "")
        yield RawExample(f"{name}: query {query_id!r}", query, positives, negatives)


def candidate_examples(dataset: Any, topics: Topics, name: str) -> Iterator[RawExample]:
    """One example for each judged query: its relevant passages against its other scoreddocs."""
    groups = _Groups()
    with reading(f"{name}: the scoreddocs"):
        for scored in dataset.scoreddocs_iter():
            judged = topics.qrels.get(scored.query_id)
            if judged is not None and judged.get(scored.doc_id, 0) < RELEVANT:
                groups.add(scored.query_id, None, scored.doc_id)
    candidates = {query_id: negatives for query_id, _, negatives in groups}
    for query in topics.queries:
        judged = topics.qrels[query.id]
        positives = [passage_id for passage_id, rel in judged.items() if rel >= RELEVANT]
        location = f"{name}: query {query.id!r}"
        yield RawExample(location, query, positives, candidates.get(query.id, []))


class _Groups:
    """Passages by query; ids of passages are stored once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._queries: dict[str, tuple[dict[int, None], array[int]]] = {}

    def add(self, query_id: str, positive: str | None, negative: str) -> None:
        if (group := self._queries.get(query_id)) is None:
            group = self._queries[query_id] = ({}, array("i"))
        if positive is not None:
            group[0][self._number(positive)] = None
        group[1].append(self._number(negative))

    def __iter__(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Query, positives and negatives, each passage once; frees what it yields."""
        ids = list(self._numbers)
        for query_id in list(self._queries):
            positives, negatives = self._queries.pop(query_id)
            yield (
                query_id,
                [ids[number] for number in positives],
                [ids[number] for number in dict.fromkeys(negatives)],
            )

    def _number(self, passage_id: str) -> int:
        return self._numbers.setdefault(passage_id, len(self._numbers))


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Keep ir_datasets quiet, and turn anything that it raises into one error about `what`.

    What it would have printed is logged as information, or becomes the advice of the error.
    """
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        messages.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger("ir_datasets")
    logger.addFilter(collect)
    try:
        yield
    except MlflowDrError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"{what}: {error}") from error
    except Exception as error:
        failures = _failures(error)
        causes = "; ".join(dict.fromkeys(map(_cause, failures)))
        raise DataError(
            f"{what} cannot be read: {causes}; {_advice(failures, messages)}"
        ) from error
    finally:
        logger.removeFilter(collect)
    for message in messages:
        if not message.startswith(PROGRESS_MESSAGES):
            log.info("ir_datasets: %s", message)


def _failures(error: Exception) -> list[Exception]:
    """The error itself, or for a failed download the errors of its mirrors."""
    match error.args:
        # ir_datasets.util.Download raises RuntimeError(text, [(mirror, error), ...])
        case (str(), [(_, Exception()), *_] as failures):
            errors = [failure for _, failure in failures]
            return [e for e in errors if not isinstance(e, FileNotFoundError)] or errors
    return [error]


def _cause(error: Exception) -> str:
    kind = type(error).__name__
    if host := _host(error):
        return f"the download from {host} failed ({kind})"
    return " ".join(f"{kind}: {error}".split())


def _host(error: Exception) -> str:
    """The server that an error of `requests` is about; empty for any other error."""
    request = getattr(error, "request", None)
    return urlsplit(request.url).netloc if request is not None else ""


def _advice(failures: list[Exception], messages: list[str]) -> str:
    home = str(Path(os.environ.get(HOME_VARIABLE, "~/.ir_datasets")).expanduser())
    # ir_datasets prints where to put a file that has to be fetched by hand
    by_hand = next((message for message in reversed(messages) if home in message), None)
    if any(_host(error) for error in failures):
        files = f"put the files under {home} ({HOME_VARIABLE})"
        return f"connect to the network, or {by_hand or files}"
    if by_hand and isinstance(failures[-1], FileNotFoundError):
        return by_hand
    return (
        f"remove what is damaged under {home} ({HOME_VARIABLE}) and read again; "
        "if the error stays, upgrade ir_datasets"
    )
