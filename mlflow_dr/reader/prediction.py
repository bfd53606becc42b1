"""Answers of a reader: the best passage, then its best span, for several numbers of passages."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mlflow_dr.devices import is_onednn_faster, resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.encoder.onednn import OneDnnLayers
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.files import atomic_write
from mlflow_dr.progress import progress_bar
from mlflow_dr.reader.config import ReaderEvalConfig, ReaderPredictConfig
from mlflow_dr.reader.data import PassageText, ReaderData, ReaderQuestion
from mlflow_dr.reader.model import ExtractiveReader, open_reader
from mlflow_dr.reader.preprocessing import reader_data
from mlflow_dr.reader.scoring import exact_match, f1
from mlflow_dr.reader.sequences import SequenceBuilder
from mlflow_dr.reader.spans import best_passages, best_span, whole_words
from mlflow_dr.reader.training import check_length
from mlflow_dr.retrieval.encode import TOKENS_PER_BATCH
from mlflow_dr.retrieval.measures import Measure, mean_values
from mlflow_dr.training.batches import padded

log = logging.getLogger(__name__)

SEQUENCES_AT_A_TIME = 512
MEASURES = ("em", "f1", "em_decoded")


class FoundAnswer(NamedTuple):
    """An answer that a reader found.

    Attributes:
        text: cut from the passage.
        decoded: the text of its tokens, as DPR decodes it: for an uncased model without capitals
            and accents, and with blanks around punctuation.
        score: the sum of the logits of its first and its last token.
        relevance: the logit of the passage.
        place: the passage's place in the retriever's order, from 0.
        passage: the passage.
    """

    text: str
    decoded: str
    score: float
    relevance: float
    place: int
    passage: PassageText


class QuestionAnswers(NamedTuple):
    """A question with an answer for each number of passages; None where no passage has a token."""

    question: str
    gold_answers: list[str]
    answers: dict[int, FoundAnswer | None]


class ReaderPredictor:
    """Finds answers with a reader.

    Args:
        reader: on its device and in its dtype.
        tokenizer: the reader's.
        counts: numbers of passages.
        length: the most tokens of a sequence.
        max_answer_length: the most tokens of an answer, before it is extended to whole words.
    """

    def __init__(
        self,
        reader: ExtractiveReader,
        tokenizer: Any,
        counts: Sequence[int],
        length: int = 350,
        max_answer_length: int = 10,
    ) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._counts = counts
        self._length = length
        self._max_answer_length = max_answer_length

    def predict(self, data: ReaderData) -> Iterator[QuestionAnswers]:
        """The answers of each question, in order.

        Raises:
            CheckpointError: the reader gives NaN.
        """
        per_call = max(1, SEQUENCES_AT_A_TIME // max(self._counts))
        for start in range(0, len(data), per_call):
            questions = [data[index] for index in range(start, min(start + per_call, len(data)))]
            yield from self._some(data, questions)

    def _some(
        self, data: ReaderData, questions: Sequence[ReaderQuestion]
    ) -> Iterator[QuestionAnswers]:
        most = max(self._counts)
        pairs = [
            [data.sequence(question, int(row)) for row in question.others[:most]]
            for question in questions
        ]
        sequences = [ids[: self._length] for some in pairs for ids, _ in some]
        starts, ends, relevance = self._logits(sequences)
        first = 0
        for question, some in zip(questions, pairs, strict=True):
            rows = slice(first, first + len(some))
            first += len(some)
            offsets = np.array([offset for _, offset in some], np.int64)
            lengths = np.array([min(len(ids), self._length) for ids, _ in some], np.int64)
            chosen = best_passages(relevance[rows], offsets < lengths, self._counts)
            answers: dict[int, FoundAnswer | None] = dict.fromkeys(self._counts)
            for count, place in zip(self._counts, chosen, strict=True):
                if place < 0:
                    continue
                row, cut = rows.start + place, slice(offsets[place], lengths[place])
                span = best_span(starts[row, cut], ends[row, cut], self._max_answer_length)
                passage = data.passage(int(question.others[place]))
                ids = some[place][0][offsets[place] :]
                texts = self._texts(data.builder, passage, ids, span.start, span.end)
                logit = float(relevance[row])
                answers[count] = FoundAnswer(*texts, span.score, logit, place, passage)
            yield QuestionAnswers(question.question, question.answers, answers)

    @torch.inference_mode()
    def _logits(self, sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not sequences:
            empty = np.empty((0, 0), np.float32)
            return empty, empty, np.empty(0, np.float32)
        batch = padded(sequences, self._tokenizer.pad_token_id or 0)
        device = self._reader.device
        logits = self._reader(**{name: value.to(device) for name, value in batch.items()})
        starts, ends, relevance = (values.cpu().numpy() for values in logits)
        if np.isnan(relevance).any() or np.isnan(starts).any() or np.isnan(ends).any():
            raise CheckpointError("the reader gives NaN; its weights are broken (try --dtype fp32)")
        return starts, ends, relevance

    def _texts(
        self, builder: SequenceBuilder, passage: PassageText, ids: np.ndarray, start: int, end: int
    ) -> tuple[str, str]:
        """A span as it is in the passage, and as its tokens are decoded."""
        offsets, words = builder.words(passage.text)
        start, end = whole_words(start, end, words)
        decoded = self._tokenizer.decode(
            ids[start : end + 1].tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=True,
        )
        return passage.text[offsets[start, 0] : offsets[end, 1]], decoded


def predict_answers(config: ReaderPredictConfig) -> dict[Measure, float]:
    """Answer the questions of a file of results, and measure the answers.

    Returns:
        Means of `question_measures`.

    Raises:
        UsageError: the output exists, or more passages are evaluated than are read.
        DataError: the results cannot be read.
        CheckpointError: the reader is damaged, or is none.
    """
    check_counts(config)
    if config.output and config.output.exists() and not config.force:
        raise UsageError(f"{config.output} exists already; --force replaces it")
    reader, tokenizer = open_reader(config.reader, config.tracking_uri)
    found = find_answers(reader, tokenizer, config, prediction_data(tokenizer, config))
    if config.output:
        write_predictions(config.output, found)
    return mean_values(question_measures(found))


def check_counts(config: ReaderEvalConfig) -> None:
    """Refuse to evaluate more passages than are read.

    Raises:
        UsageError: with both numbers.
    """
    most = max(config.top_docs)
    if most > config.passages_per_question:
        raise UsageError(
            f"--eval-top-docs {most}: only {config.passages_per_question} passages are read; pass "
            "a larger --passages-per-question"
        )


def measure_names(config: ReaderEvalConfig) -> list[str]:
    """The names of the figures that `question_measures` gives."""
    return [f"{name}@{count}" for count in config.top_docs for name in MEASURES]


def prediction_data(tokenizer: Any, config: ReaderEvalConfig) -> ReaderData:
    """The questions and passages of a file of results, as a reader with this tokenizer reads them.

    Raises:
        DataError: the results cannot be read.
    """
    builder = SequenceBuilder(tokenizer)
    return reader_data(config.results, builder, training=False, gold=config.gold_passages)


def find_answers(
    reader: Any, tokenizer: Any, config: ReaderEvalConfig, data: ReaderData
) -> list[QuestionAnswers]:
    """The answers of a reader to questions, in order.

    Args:
        reader: as `load_reader` gives it; it is moved to the device, into the number format.
        tokenizer: the reader's.
        config: how passages are read.
        data: the questions and passages.
    """
    check_length(reader, config.sequence_length)
    device = resolve_device(config.device)
    reader.to(device)
    reader.backbone.to(torch_dtype(resolve_dtype(config.dtype, device)))
    predictor = ReaderPredictor(
        reader,
        tokenizer,
        config.top_docs,
        config.sequence_length,
        config.max_answer_length,
    )
    found = []
    layers: AbstractContextManager[None] = nullcontext()
    if is_onednn_faster(device):
        layers = OneDnnLayers(reader.backbone, TOKENS_PER_BATCH[device.type]).used()
    with layers, progress_bar(len(data), "reading", "questions") as bar:
        for answers in predictor.predict(data):
            found.append(answers)
            bar.update(1)
    return found


def question_measures(found: Sequence[QuestionAnswers]) -> dict[str, dict[Measure, float]]:
    """The values of each question, by its index, for each number of passages n.

    Returns:
        `em@n` and `f1@n` of the answer that is cut from the text, and `em_decoded@n` of DPR's
        decoded text.
    """
    return {
        str(index): {
            Measure(f"{name}@{count}"): float(score(text, question.gold_answers))
            for count, answer in question.answers.items()
            for name, score, text in (
                ("em", exact_match, answer.text if answer else ""),
                ("f1", f1, answer.text if answer else ""),
                ("em_decoded", exact_match, answer.decoded if answer else ""),
            )
        }
        for index, question in enumerate(found)
    }


def write_predictions(path: Path, found: Sequence[QuestionAnswers]) -> None:
    """Write answers as DPR's reader does, with `decoded_text` added."""
    with atomic_write(path) as partial:
        content = [_record(answers) for answers in found]
        partial.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _record(found: QuestionAnswers) -> Mapping[str, Any]:
    predictions = []
    for count, answer in found.answers.items():
        prediction: dict[str, Any] = {"text": "", "passage_idx": None}
        if answer is not None:
            prediction = {
                "text": answer.text,
                "score": answer.score,
                "relevance_score": answer.relevance,
                "passage_idx": answer.place,
                "passage": answer.passage.text,
                "decoded_text": answer.decoded,
            }
        predictions.append({"top_k": count, "prediction": prediction})
    return {
        "question": found.question,
        "gold_answers": found.gold_answers,
        "predictions": predictions,
    }
