"""Questions become batches of token ids for the reader's training."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlflow_dr.errors import DataError
from mlflow_dr.reader.data import ReaderData, ReaderQuestion
from mlflow_dr.training.batches import padded

log = logging.getLogger(__name__)


class ReaderGroup(NamedTuple):
    """A question with its positive first and its negatives after.

    Attributes:
        sequences: token ids of question, title and passage, each `(length,) int32`.
        spans: first and last token of each answer in the first sequence, `(n_spans, 2) int64`.
    """

    sequences: list[np.ndarray]
    spans: np.ndarray


class ReaderTrainingSet(Dataset[ReaderGroup]):
    """Questions, with passages chosen anew for each visit.

    Positives and negatives of a question take turns from visit to visit, in an order that depends
    only on the question's index and the seed. A positive whose answers are all cut off is not used;
    a question without any other is left out.

    Args:
        data: made for training.
        length: the most tokens of a sequence.
        n_passages: passages per question: one positive, and negatives; fewer where the question has
            fewer.
        max_answers: the most places of answers that are learnt from.
        seed: random seed of the order.

    Raises:
        DataError: no question is left.
    """

    def __init__(
        self, data: ReaderData, length: int, n_passages: int, max_answers: int, seed: int
    ) -> None:
        self._data = data
        self._length = length
        self._n_negatives = n_passages - 1
        self._max_answers = max_answers
        self._seed = seed
        # in shared memory, so that workers that outlive an epoch see the next one
        self._visit = torch.zeros((), dtype=torch.int64).share_memory_()
        self._indices = [index for index in range(len(data)) if self._usable(data[index])]
        if cut := len(data) - len(self._indices):
            log.warning(
                "left out %d of %d questions, whose answers are all behind token %d; a longer "
                "--sequence-length keeps them",
                *(cut, len(data), length),
            )
        if not self._indices:
            raise DataError(
                f"no question has an answer within {length} tokens; pass a longer --sequence-length"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose passages for this visit of each question, counted from 0."""
        self._visit.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> ReaderGroup:
        return self.group(index, int(self._visit))

    def group(self, index: int, visit: int) -> ReaderGroup:
        """A question with the passages of a visit."""
        number = self._indices[index]
        question = self._data[number]
        usable = self._usable(question)
        choice = usable[self._turns(f"positives:{number}", len(usable), 1, visit)[0]]
        turns = self._turns(f"negatives:{number}", len(question.others), self._n_negatives, visit)
        rows = [question.positives[choice], *question.others[turns]]
        pairs = [self._data.sequence(question, int(row)) for row in rows]
        spans = question.spans[choice].astype(np.int64) + pairs[0][1]
        fitting = spans[spans[:, 1] < self._length][: self._max_answers]
        return ReaderGroup([ids[: self._length] for ids, _ in pairs], fitting)

    def _usable(self, question: ReaderQuestion) -> list[int]:
        """The positives that have an answer before the cut."""
        offsets = [self._data.offset(question, int(row)) for row in question.positives]
        return [
            index
            for index, (spans, offset) in enumerate(zip(question.spans, offsets, strict=True))
            if (spans[:, 1] + offset < self._length).any()
        ]

    def _turns(self, name: str, total: int, count: int, visit: int) -> list[int]:
        """The next `count` of `total` indices, at most all of them."""
        order = list(range(total))
        random.Random(f"{self._seed}:{name}").shuffle(order)
        return [order[(visit * count + turn) % total] for turn in range(min(count, total))]


class ReaderCollator:
    """Makes a batch of groups.

    Args:
        pad_id: the token id that pads.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, groups: Sequence[ReaderGroup]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            `input_ids` and `attention_mask`, `(n, length)`; `places`, the question and the passage
            of each sequence, `(n, 2)`; `spans`, `(n_questions, n_spans, 2)`, and `span_mask`.
        """
        sequences = [sequence for group in groups for sequence in group.sequences]
        places = [
            (question, passage)
            for question, group in enumerate(groups)
            for passage in range(len(group.sequences))
        ]
        counts = np.array([len(group.spans) for group in groups])
        mask = np.arange(counts.max()) < counts[:, None]
        spans = np.zeros((*mask.shape, 2), np.int64)
        spans[mask] = np.concatenate([group.spans for group in groups])
        return {
            **padded(sequences, self._pad_id),
            "places": torch.tensor(places),
            "spans": torch.from_numpy(spans),
            "span_mask": torch.from_numpy(mask),
        }


def by_question(relevance: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The relevance of each question's passages, and which sequences are the positives.

    Args:
        relevance: of each sequence, `(n,)`.
        places: as `ReaderCollator` has them.

    Returns:
        `(n_questions, n_passages)`, -inf where a question has fewer; and `(n_questions,)`.
    """
    questions, passages = places.unbind(1)
    table = relevance.new_full((int(questions.max()) + 1, int(passages.max()) + 1), -torch.inf)
    positives = (passages == 0).nonzero()[:, 0]
    return table.index_put((questions, passages), relevance), positives
