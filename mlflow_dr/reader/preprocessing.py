"""The reader's data: a retriever's results as questions, passages and spans of answers in Arrow.

Which passages are positives and negatives is DPR's rule. A positive is a passage that has an answer
and in whose token ids an answer's token ids are found. With a file of gold passages, the passages
of the question's own article are the positives, if there are any.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.collection.results import Result, ResultPassage, read_results
from mlflow_dr.encoder.tokenize import load_tokenizer
from mlflow_dr.errors import DataError
from mlflow_dr.reader.config import ReaderDataConfig
from mlflow_dr.reader.data import QuestionPassages, ReaderData, write_reader_data
from mlflow_dr.reader.gold import GoldTitles
from mlflow_dr.reader.sequences import SequenceBuilder, as_characters, find_spans

log = logging.getLogger(__name__)

LAYOUT = 1
"""Raise it when the rules below change, so that data cached before is not used."""
QUESTIONS_AT_A_TIME = 128

NO_POSITIVES = "questions without a passage to learn from"
NO_SPAN = "passages with an answer whose tokens are not found in them"
NO_TOKENS = "answers without tokens"


@dataclass(frozen=True)
class ReaderLimits:
    """How many passages of a question are used.

    Attributes:
        max_passages: of the retriever's passages, for training.
        max_positives: positives, where none is from the question's own article.
        negatives_per_positive: negatives for each positive, within the next two.
        min_negatives: smallest limit of negatives.
        max_negatives: largest limit of negatives.
        max_predicted: of the retriever's passages, for prediction.
    """

    max_passages: int = 200
    max_positives: int = 20
    negatives_per_positive: int = 10
    min_negatives: int = 50
    max_negatives: int = 150
    max_predicted: int = 100

    def negatives(self, positives: int) -> int:
        """The most negatives of a question."""
        wanted = self.negatives_per_positive * positives
        return min(max(wanted, self.min_negatives), self.max_negatives)


def prepare_data(config: ReaderDataConfig) -> ReaderData:
    """The reader's data of a configuration; see `reader_data`."""
    builder = SequenceBuilder(load_tokenizer(config.model))
    training, gold = config.is_train_set, config.gold_passages
    return reader_data(config.results, builder, training=training, gold=gold)


def reader_data(
    results: Path,
    builder: SequenceBuilder,
    *,
    training: bool,
    gold: Path | None = None,
    limits: ReaderLimits | None = None,
) -> ReaderData:
    """The reader's data of a file of results, made once and mapped from the user's cache.

    Args:
        results: a retriever's results: `question`, `answers` and `ctxs`, as DPR writes them.
        builder: makes token ids.
        training: whether positives with spans, and negatives, are chosen; otherwise the first
            passages are taken as they are.
        gold: DPR's file of gold passages.
        limits: how many passages of a question are used.

    Raises:
        DataError: a file is missing or malformed, passages do not say whether they have an answer,
            or nothing can be learnt from.
    """
    limits = limits or ReaderLimits()
    states = [state_of(path) for path in (results, gold) if path]
    key = "\n".join(map(str, [LAYOUT, training, *states, builder.digest, *astuple(limits)]))

    def write(directory: Path) -> None:
        questions = selected(results, builder, training, GoldTitles(gold), limits)
        write_reader_data(directory, questions, builder, results)

    return ReaderData(cache_entry("reader", key, write, str(results)), builder)


def selected(
    results: Path, builder: SequenceBuilder, training: bool, gold: GoldTitles, limits: ReaderLimits
) -> Iterator[QuestionPassages]:
    """The questions of a file of results with their passages; see `reader_data`."""
    skipped: Counter[str] = Counter()
    records = read_results(results)
    while some := list(islice(records, QUESTIONS_AT_A_TIME)):
        if training:
            yield from _for_training(some, builder, gold, limits, skipped)
            continue
        for _, result in some:
            question = gold.original(result.question)
            passages = result.ctxs[: limits.max_predicted]
            yield QuestionPassages(question, result.answer_list, passages, [])
    for reason, count in (+skipped).items():
        log.warning("%s: left out %d %s", results, count, reason)


def _for_training(
    results: Sequence[tuple[str, Result]],
    builder: SequenceBuilder,
    gold: GoldTitles,
    limits: ReaderLimits,
    skipped: Counter[str],
) -> Iterator[QuestionPassages]:
    candidates = [
        [
            passage
            for passage in result.ctxs[: limits.max_passages]
            if _has_answer(passage, location)
        ]
        for location, result in results
    ]
    passages = iter(builder.bare([passage.text for some in candidates for passage in some]))
    answers = iter(builder.bare([text for _, result in results for text in result.answer_list]))
    for (_, result), some in zip(results, candidates, strict=True):
        sought = [as_characters(next(answers)) for _ in result.answer_list]
        skipped[NO_TOKENS] += sought.count("")
        spans = [find_spans(as_characters(next(passages)), sought) for _ in some]
        with_spans = [pair for pair in zip(some, spans, strict=True) if pair[1]]
        skipped[NO_SPAN] += len(some) - len(with_spans)
        question = gold.original(result.question)
        positives = [pair for pair in with_spans if gold.matches(question, pair[0].title or "")]
        positives = positives or with_spans[: limits.max_positives]
        if not positives:
            skipped[NO_POSITIVES] += 1
            continue
        negatives = [p for p in result.ctxs[: limits.max_passages] if not p.has_answer]
        chosen = [*(p for p, _ in positives), *negatives[: limits.negatives(len(positives))]]
        yield QuestionPassages(
            question, result.answer_list, chosen, [spans for _, spans in positives]
        )


def _has_answer(passage: ResultPassage, location: str) -> bool:
    if passage.has_answer is None:
        raise DataError(
            f"{location}: a passage has no has_answer (true or false), which says whether "
            "it has an answer; write the results by `mlflow-dr search --format dpr`, or DPR's "
            "dense_retriever"
        )
    return passage.has_answer
