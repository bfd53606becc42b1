"""From training examples to batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlflow_dr.collection.interface import Examples
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.errors import DataError


class Group(NamedTuple):
    """One query with its positive first and its negatives after."""

    query: Query
    passages: list[Passage]


class TrainingSet(Dataset[Group]):
    """Examples with their passages chosen for the epoch.

    The positive rotates from epoch to epoch and the negatives rotate without repetition, through an
    order that depends on the query and the seed alone. A query with fewer negatives than asked
    repeats them.

    Args:
        examples: what is trained on.
        n_passages: passages per query; the first is a positive, the rest are hard negatives.
        seed: of the choice.

    Raises:
        DataError: on reading an example without positives, or without negatives where some are
            asked for.
    """

    def __init__(self, examples: Examples, n_passages: int, seed: int) -> None:
        self._examples = examples
        self._n_negatives = n_passages - 1
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose for this epoch from now on; the Trainer's data loader calls it."""
        self._epoch = int(epoch)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Group:
        example = self._examples[index]
        positives = self._rotated(example, "positives", example.positives, 1)
        negatives = self._rotated(example, "negatives", example.negatives, self._n_negatives)
        return Group(example.query, positives + negatives)

    def _rotated(
        self, example: Example, role: str, passages: Sequence[Passage], count: int
    ) -> list[Passage]:
        if count == 0:
            return []
        if not passages:
            raise DataError(
                f"query {example.query.id!r} has no {role}; train with --train_n_passages 1 to use "
                "in-batch negatives only"
                if role == "negatives"
                else f"query {example.query.id!r} has no positives to train on"
            )
        order = list(passages)
        random.Random(f"{self._seed}:{role}:{example.query.id}").shuffle(order)
        start = self._epoch * count
        return [order[(start + offset) % len(order)] for offset in range(count)]


class Collator:
    """Groups to padded token ids."""

    def __init__(self, tokenizing: Tokenizing) -> None:
        self._tokenizing = tokenizing

    def __call__(self, groups: Sequence[Group]) -> dict[str, dict[str, Tensor]]:
        """Token ids of `(n)` queries and `(n * n_passages)` passages, with their masks."""
        queries = [group.query for group in groups]
        passages = [passage for group in groups for passage in group.passages]
        return {
            "query": self._padded(self._tokenizing.query_ids(queries)),
            "passage": self._padded(self._tokenizing.passage_ids(passages)),
        }

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._tokenizing.pad_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}
