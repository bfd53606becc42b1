"""The collections of ir_datasets by its ids, such as `beir/scifact` or `vaswani`.

Source: MacAvaney et al., Simplified Data Wrangling with ir_datasets, SIGIR 2021.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.drafts import RawExample
from mlflow_dr.collection.examples import JudgedExamples, cached_examples
from mlflow_dr.collection.interface import Examples, check_split
from mlflow_dr.collection.irds_pairs import candidate_examples, pair_examples
from mlflow_dr.collection.irds_reading import HOME_VARIABLE, reading
from mlflow_dr.collection.judgements import EXPECTED, RELEVANCES, checked_topics
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import DataError, MissingExtraError, UsageError, quoted

# ir_datasets waits 15 s three times for each mirror by default. Its retries start anew whenever
# bytes arrive from a server that can resume, so fewer of them do not harm a long download.
LESS_PATIENCE = {"IR_DATASETS_DL_TRIES": "2", "IR_DATASETS_DL_TIMEOUT": "10"}
NO_BARS = {"IR_DATASETS_DL_DISABLE_PBAR": "true"}


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

    def examples(self) -> Examples:
        """One example for each query; what the negatives are depends on what the id has itself.

        Of its `docpairs` (MS MARCO's triples), the second passages; else of its `scoreddocs`, the
        candidates that are not judged relevant; else, and for an id whose members are the splits,
        there are none and the relevant passages of the train split are the positives.

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
    where = f"ir_datasets {dataset_id}"
    return checked_topics(where, _queries(dataset, where), _qrels(dataset, where), corpus)


def _passages(dataset: Any, where: str) -> Iterator[Passage]:
    seen: set[str] = set()
    with reading(f"{where}: the passages"):
        for doc in dataset.docs_iter():
            if doc.doc_id in seen:
                raise DataError(f"{where}: passage id {quoted(doc.doc_id)} is used twice")
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
    with reading(f"{where}: the queries"):
        for query in dataset.queries_iter():
            text = getattr(query, "text", None)
            if text is None:
                text = _default_text(query, where)
            yield Query(query.query_id, text, _answers(query))


def _answers(query: Any) -> Sequence[str]:
    """Short answers, where the query has them (those of `dpr-w100` and `msmarco-qna` do)."""
    answers = getattr(query, "answers", ())
    if isinstance(answers, list | tuple) and all(isinstance(one, str) for one in answers):
        return tuple(answers)
    return ()


def _qrels(dataset: Any, where: str) -> dict[str, dict[str, int]]:
    """Judgements; a passage that is judged several times (by subtopic) keeps the highest."""
    qrels: dict[str, dict[str, int]] = {}
    with reading(f"{where}: the judgements"):
        for qrel in dataset.qrels_iter():
            judged = qrels.setdefault(qrel.query_id, {})
            relevance = int(qrel.relevance)
            if relevance not in RELEVANCES:
                raise DataError(
                    f"{where}: query {qrel.query_id!r} and passage {qrel.doc_id!r} have relevance "
                    f"{relevance}; expected {EXPECTED}"
                )
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
    with reading(where):
        return dataset.docs_handler()


def _members(dataset_id: str) -> dict[str, Any]:
    """The datasets below an id, by their full ids."""
    below = [other for other in _library().registry if other.startswith(f"{dataset_id}/")]
    return {member: _loaded(member) for member in below}


def _loaded(dataset_id: str) -> Any:
    """The dataset object of an id; nothing is read yet."""
    registry = _library().registry
    with reading(f"irds:{dataset_id}"):
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
