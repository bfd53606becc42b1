"""The collections of ir_datasets by its ids, such as `beir/scifact` or `vaswani`.

Source: MacAvaney et al., Simplified Data Wrangling with ir_datasets, SIGIR 2021.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.interface import check_split
from mlflow_dr.collection.judgements import checked_topics
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import DataError, MissingExtraError, MlflowDrError, UsageError

log = logging.getLogger(__name__)

HOME_VARIABLE = "IR_DATASETS_HOME"

# ir_datasets waits 15 s three times for each mirror by default. Its retries start anew whenever
# bytes arrive from a server that can resume, so fewer of them do not harm a long download.
LESS_PATIENCE = {"IR_DATASETS_DL_TRIES": "2", "IR_DATASETS_DL_TIMEOUT": "10"}
NO_BARS = {"IR_DATASETS_DL_DISABLE_PBAR": "true"}

PROGRESS_MESSAGES = ("[", "download error", "Download failed")


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
        """The last part of an id that is judged itself, else the judged members over its passages.

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

    def corpus(self) -> Corpus:
        """The passages; ids that share them (such as the splits of one collection) share a cache.

        Raises:
            DataError: they cannot be downloaded or read, have no text, or repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        with _reading(self.name):
            owner = _library().docs_parent_id(self._id)
            # the published count: `docs_count()` opens stores, and changes when one is built
            count = self._dataset.docs_metadata().get("count")
        return cached_corpus(f"irds:{owner}:{count}", _passages(self._dataset, self.name), count)

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        judged_itself = _is_judged(self._dataset)
        return topics_of(self._id if judged_itself else f"{self._id}/{split}", self._corpus)

    def examples(self) -> JudgedExamples:
        """One example for each query of the train split that has a relevant passage."""
        return JudgedExamples(self.topics("train"), self._corpus)

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
    where = f"ir_datasets {dataset_id}"
    return checked_topics(where, _queries(dataset, where), _qrels(dataset, where), corpus)


def _passages(dataset: Any, where: str) -> Iterator[Passage]:
    seen: set[str] = set()
    with _reading(f"{where}: the passages"):
        for doc in dataset.docs_iter():
            if doc.doc_id in seen:
                raise DataError(f"{where}: passage id {doc.doc_id!r} is used twice")
            seen.add(doc.doc_id)
            yield _passage(doc, where)


def _passage(doc: Any, where: str) -> Passage:
    """Title and text apart: `default_text()`, where it is needed, mostly starts with the title."""
    title = getattr(doc, "title", None) or ""
    text = getattr(doc, "text", None)
    if text is None:
        text = _default_text(doc, where).removeprefix(title).strip()
    return Passage(doc.doc_id, title, text)


def _queries(dataset: Any, where: str) -> Iterator[Query]:
    with _reading(f"{where}: the queries"):
        for query in dataset.queries_iter():
            text = getattr(query, "text", None)
            yield Query(query.query_id, _default_text(query, where) if text is None else text)


def _qrels(dataset: Any, where: str) -> dict[str, dict[str, int]]:
    """Judgements; a passage that is judged several times (by subtopic) keeps the highest."""
    qrels: dict[str, dict[str, int]] = {}
    with _reading(f"{where}: the judgements"):
        for qrel in dataset.qrels_iter():
            judged = qrels.setdefault(qrel.query_id, {})
            relevance = int(qrel.relevance)
            judged[qrel.doc_id] = max(relevance, judged.get(qrel.doc_id, relevance))
    return qrels


def _default_text(record: Any, where: str) -> str:
    if not hasattr(record, "default_text"):
        raise DataError(
            f"{where}: a {type(record).__name__} has no text to search with; its fields are "
            f"{', '.join(record._fields)}"
        )
    return str(record.default_text())


def _is_judged(dataset: Any) -> bool:
    return bool(dataset.has_docs() and dataset.has_queries() and dataset.has_qrels())


def _docs_handler(dataset: Any, where: str) -> Any:
    """What reads the passages; equal for ids that share their passages."""
    with _reading(where):
        return dataset.docs_handler()


def _members(dataset_id: str) -> dict[str, Any]:
    """The datasets below an id, by their full ids."""
    below = [other for other in _library().registry if other.startswith(f"{dataset_id}/")]
    return {member: _loaded(member) for member in below}


def _loaded(dataset_id: str) -> Any:
    """The dataset object of an id; nothing is read yet."""
    registry = _library().registry
    with _reading(f"irds:{dataset_id}"):
        try:
            return registry[dataset_id]
        except KeyError:
            close = difflib.get_close_matches(dataset_id, list(registry), n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise UsageError(
                f"ir_datasets has no {dataset_id!r}: {hint}https://ir-datasets.com lists its ids"
            ) from None


def _library() -> Any:
    """The module ir_datasets.

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


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Keeps ir_datasets quiet, and turns whatever it raises into one error about `what`.

    What it would have printed is logged as information, or becomes the way out of the error.
    """
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        heard.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger("ir_datasets")
    logger.addFilter(hear)
    try:
        yield
    except MlflowDrError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"{what}: {error}") from error
    except Exception as error:
        failures = _failures(error)
        causes = "; ".join(dict.fromkeys(map(_cause, failures)))
        raise DataError(f"{what} cannot be read: {causes}; {_way_out(failures, heard)}") from error
    finally:
        logger.removeFilter(hear)
    for message in heard:
        if not message.startswith(PROGRESS_MESSAGES):
            log.info("ir_datasets: %s", message)


def _failures(error: Exception) -> list[Exception]:
    """The error itself, or for a failed download the errors of its mirrors."""
    match error.args:
        # ir_datasets.util.Download raises RuntimeError(text, [(mirror, error), ...])
        case (str(), [(_, Exception()), *_] as failures):
            errors = [failure for _, failure in failures]
            return [each for each in errors if not isinstance(each, FileNotFoundError)] or errors
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


def _way_out(failures: list[Exception], heard: list[str]) -> str:
    home = str(Path(os.environ.get(HOME_VARIABLE, "~/.ir_datasets")).expanduser())
    # ir_datasets prints where a file belongs that was, or can only be, fetched by hand
    by_hand = next((message for message in reversed(heard) if home in message), None)
    if any(_host(error) for error in failures):
        files = f"put the files under {home} ({HOME_VARIABLE})"
        return f"connect to the network, or {by_hand or files}"
    if by_hand and isinstance(failures[-1], FileNotFoundError):
        return by_hand
    return (
        f"remove what is damaged under {home} ({HOME_VARIABLE}) and read again; "
        "if the error stays, upgrade ir_datasets"
    )
