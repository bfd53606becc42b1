"""The questions of a `mlflow-dr qa`: samples of two splits as files, and what the retriever learns.

Examples of a collection without any follow Karpukhin et al., Dense Passage Retrieval for
Open-Domain Question Answering, EMNLP 2020: the best passage of BM25 with an answer is the positive,
the best ones without an answer are hard negatives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.catalogue import Collection, chosen_split, open_collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import write_lines
from mlflow_dr.collection.locations import quoted_path
from mlflow_dr.collection.qrels import write_qrels
from mlflow_dr.collection.question_answering import QuestionCollection
from mlflow_dr.collection.records import Topics
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.files import atomic_write
from mlflow_dr.qa.config import QaConfig
from mlflow_dr.retrieval.bm25 import Bm25Retriever
from mlflow_dr.retrieval.matching import AnswerMatcher

log = logging.getLogger(__name__)

TRAIN, DEV = "train", "dev"
BM25_DEPTH, NEGATIVES = 50, 8


class Questions(NamedTuple):
    """What is searched, and what the retriever learns from.

    Attributes:
        dataset: the collection of the samples, with the splits `train` and `dev`.
        training: flags of `mlflow-dr train` that name the examples.
        is_judged: whether the questions have judgements beside their answers.
    """

    dataset: str
    training: list[str]
    is_judged: bool


def prepare_questions(config: QaConfig, folder: Path) -> Questions:
    """Write samples of the questions, and examples if the collection has none.

    Args:
        config: the collection, its splits and the sizes of the samples.
        folder: what is written; it is complete, or it does not exist.

    Raises:
        UsageError: there is no such collection or split, or a split has no answers.
        DataError: the collection's files are damaged, or nothing can be learnt from.
    """
    collection, splits = open_questions(config)
    sizes = {TRAIN: config.train_questions, DEV: config.dev_questions}
    topics = {
        name: sampled(
            collection.topics(split), sizes[name], config.seed, f"{collection.name}/{split}"
        )
        for name, split in splits.items()
    }
    is_judged = all(some.qrels for some in topics.values())
    with atomic_write(folder) as partial:
        partial.mkdir()
        passages = _passages(collection, partial)
        (_write_judged if is_judged else _write_questions)(partial, topics)
        learns = _has_examples(collection)
        if not learns:
            lines = found_examples(collection.corpus(), topics[TRAIN], config.match)
            write_lines(partial / "examples.jsonl", lines)
    name = str(folder.absolute())
    if not is_judged:
        place = quoted_path(passages or folder.absolute() / "corpus.jsonl")
        files = [quoted_path(folder.absolute() / f"qas-{split}.jsonl") for split in topics]
        name = f"dpr:{place}?queries={','.join(files)}"
    named = ["--dataset", collection.name if learns else name]
    named += [] if learns else ["--train_dir", str(folder.absolute() / "examples.jsonl")]
    named += ["--validation_dataset", name, "--validation_split", DEV]
    return Questions(name, named, is_judged)


def open_questions(config: QaConfig) -> tuple[Collection, dict[str, str]]:
    """The collection, and its splits for training and for measuring.

    Raises:
        UsageError: there is no such collection or split.
    """
    collection = open_collection(config.dataset)
    return collection, {
        TRAIN: _train_split(collection, config),
        DEV: _dev_split(collection, config),
    }


def sampled(topics: Topics, size: int, seed: int, location: str) -> Topics:
    """A random sample of the questions that have answers, in their order.

    Raises:
        UsageError: none has answers.
    """
    queries = [query for query in topics.queries if query.answers]
    if not queries:
        raise UsageError(
            f"{location}: none of {len(topics.queries)} questions has an answer; question "
            "answering needs a split with answers"
        )
    if len(queries) > size:
        chosen = np.random.default_rng(seed).choice(len(queries), size, replace=False)
        queries = [queries[index] for index in np.sort(chosen).tolist()]
    return topics.of(queries)


def found_examples(corpus: Corpus, topics: Topics, match: str) -> Iterator[Mapping[str, Any]]:
    """Training examples of questions with answers, from BM25's first passages.

    Raises:
        DataError: no question has a passage with an answer.
    """
    queries = list(topics.queries)
    start = written = 0
    with AnswerMatcher(corpus, match) as matcher:
        for result in Bm25Retriever().search(corpus, queries, BM25_DEPTH):
            some = queries[start : start + len(result.rows)]
            start += len(some)
            for query, rows, hits in zip(
                some, result.rows, matcher.hits(some, result.rows), strict=True
            ):
                if not hits.any():
                    continue
                negatives = rows[~hits & (rows >= 0)][:NEGATIVES].tolist()
                chosen = corpus.passages([int(rows[hits][0]), *negatives])
                written += 1
                yield {
                    "query_id": query.id,
                    "query_text": query.text,
                    "answers": list(query.answers),
                    "positive_document_ids": [chosen[0].id],
                    "negative_document_ids": [passage.id for passage in chosen[1:]],
                }
    log.info("BM25 has found a passage with an answer for %d of %d questions", written, start)
    if not written:
        raise DataError(
            f"none of {start} questions has an answer in BM25's first {BM25_DEPTH} passages, "
            "so that the retriever has nothing to learn from"
        )


def _train_split(collection: Collection, config: QaConfig) -> str:
    if config.train_split not in collection.splits:
        splits = ", ".join(collection.splits) or "none"
        raise UsageError(
            f"{collection.name} has no split {config.train_split!r} of questions to train on; name "
            f"one by --train-split, or add a file of questions (it has: {splits})"
        )
    return config.train_split


def _dev_split(collection: Collection, config: QaConfig) -> str:
    split = chosen_split(collection, config.split)
    if split == config.train_split:
        raise UsageError(
            f"{collection.name}: the questions to measure on would be those to train on "
            f"({split!r}); name another split by --split"
        )
    return split


def _has_examples(collection: Collection) -> bool:
    return not isinstance(collection, QuestionCollection) or collection.has_examples


def _passages(collection: Collection, folder: Path) -> Path | None:
    """The collection's own file of passages; None if they had to be written into the folder."""
    path = None
    if isinstance(collection, QuestionCollection | BeirFolder):
        path = collection.passages_file().absolute()
        if isinstance(collection, BeirFolder):
            (folder / path.name).symlink_to(path)
        return path
    corpus = collection.corpus()
    records = (
        {"_id": passage.id, "title": passage.title, "text": passage.text}
        for batch in corpus.batches()
        for passage in batch
    )
    write_lines(folder / "corpus.jsonl", records)
    return None


def _write_judged(folder: Path, topics: Mapping[str, Topics]) -> None:
    """Write BEIR's files; ids begin with the split, because two splits may have the same ids."""
    records = (
        {
            "_id": f"{split}-{query.id}",
            "text": query.text,
            "metadata": {"answers": list(query.answers)},
        }
        for split, some in topics.items()
        for query in some.queries
    )
    write_lines(folder / "queries.jsonl", records)
    for split, some in topics.items():
        queries = [query._replace(id=f"{split}-{query.id}") for query in some.queries]
        qrels = {f"{split}-{name}": judged for name, judged in some.qrels.items()}
        write_qrels(folder / "qrels" / f"{split}.tsv", Topics(queries, qrels))


def _write_questions(folder: Path, topics: Mapping[str, Topics]) -> None:
    for split, some in topics.items():
        records = (
            {"id": query.id, "question": query.text, "answers": list(query.answers)}
            for query in some.queries
        )
        write_lines(folder / f"qas-{split}.jsonl", records)
