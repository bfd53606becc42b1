"""Training examples become batches of token ids."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.records import Example
from mlflow_dr.devices import on_device
from mlflow_dr.encoder.token_table import corpus_tokens, query_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.stores.store import DocumentStore, open_store, store_directory

log = logging.getLogger(__name__)

Texts = Mapping[str, Any]
"""`input_ids` and `attention_mask`, each `(n_texts, length)`, padded at the right; may have
`lengths`, the tokens of each text, `(n_texts,) int64`, an array on the host."""

QUERY, PASSAGE = "query", "passage"
N_TOKENS, QUERY_IDS, LENGTHS = "n_tokens", "query_ids", "lengths"
NO_ROWS = np.empty(0, np.int64)


class TokenRows(Protocol):
    """Token ids by row: a token table, or texts that are tokenised when they are read."""

    def get_many(self, rows: np.ndarray) -> Sequence[np.ndarray]:
        """Token ids of some rows, each `(length,)`, in the order of the rows."""


class Group(NamedTuple):
    """One query with its positive first and its negatives after.

    Attributes:
        query_id: the query's id.
        query: its token ids.
        passages: token ids of each passage.
        keys: `(n_passages,) int64`, equal for equal passages of one training set.
        scores: a teacher's scores of the passages, `(n_passages,) float32`.
    """

    query_id: str
    query: np.ndarray
    passages: Sequence[np.ndarray]
    keys: np.ndarray
    scores: np.ndarray | None


class _Choice(NamedTuple):
    """Which passages a query gets, and a teacher's scores of them."""

    query_id: str
    rows: np.ndarray
    scores: np.ndarray | None


class TrainingSet(Dataset[Group]):
    """Examples, with passages chosen anew for each epoch.

    Positives and negatives of a query take turns from epoch to epoch, in an order that depends only
    on the query and the seed, not on workers, processes or other queries. A query with too few
    negatives repeats them; a query without negatives gets random passages.

    Args:
        examples: the examples.
        queries: token ids of each example's query.
        passages: token ids of each row of `examples.passages`.
        n_passages: passages per query: one positive, and hard negatives.
        seed: random seed of the order.
        with_scores: whether to read a teacher's scores.
        first_key: added to the keys of passages, so that datasets of a mixture have different keys.
        n_others: further negatives per query that are not hard.
        first_positive: whether to always use the first positive.

    Raises:
        DataError: an example that is read has no positives, or no scores with `with_scores`.
    """

    def __init__(
        self,
        examples: Examples,
        queries: TokenRows,
        passages: TokenRows,
        n_passages: int,
        seed: int,
        with_scores: bool = False,
        first_key: int = 0,
        first_positive: bool = False,
        n_others: int = 0,
    ) -> None:
        self._examples = examples
        self._queries = queries
        self._passages = passages
        self._n_negatives = n_passages - 1
        self._seed = seed
        self._with_scores = with_scores
        self._first_key = first_key
        self._first_positive = first_positive
        self._n_others = n_others
        # in shared memory, so that workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose passages for this epoch; `RetrieverTrainer` calls this before each epoch."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Group:
        return self.groups([(index, int(self._epoch))])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Group]:
        epoch = int(self._epoch)
        return self.groups([(index, epoch) for index in indices])

    def groups(self, visits: Sequence[tuple[int, int]]) -> list[Group]:
        """Examples with their passages; the passages of all are read at once.

        Args:
            visits: the index of each example, and which visit of it this is, counted from 0.
        """
        chosen = [self._choose(index, visit) for index, visit in visits]
        queries = self._queries.get_many(np.array([index for index, _ in visits], np.int64))
        rows = [choice.rows for choice in chosen]
        passages = self._passages.get_many(np.concatenate([NO_ROWS, *rows]))
        ends = np.cumsum([len(some) for some in rows]).tolist()
        return [
            Group(
                choice.query_id,
                query,
                passages[end - len(choice.rows) : end],
                choice.rows + self._first_key,
                choice.scores,
            )
            for choice, query, end in zip(chosen, queries, ends, strict=True)
        ]

    def _choose(self, index: int, visit: int) -> _Choice:
        """The passages of an example at its n-th visit."""
        example = self._examples[index]
        name = example.query.id
        n_positives = len(example.positives)
        if not n_positives:
            raise DataError(f"query {name!r} has no positives to train on")
        pool = example.negatives
        if not len(pool):
            pool = self._random(example, self._n_negatives, "random", visit)
        others = self._others(example, index, visit)
        positive = [0]
        if not self._first_positive:
            positive = self._rotated(name, "positives", n_positives, 1, visit)
        negatives = self._rotated(name, "negatives", len(pool), self._n_negatives, visit)
        chosen = [*positive, *(n_positives + index for index in negatives)]
        rows = np.concatenate([np.concatenate([example.positives, pool])[chosen], others])
        return _Choice(name, rows, self._scores(name, example.scores, chosen, len(others)))

    def _rotated(self, query_id: str, role: str, total: int, count: int, visit: int) -> list[int]:
        """The next `count` of `total` indices; those after the ones of the visit before."""
        if count == 0:
            return []
        if total == 1:
            return [0] * count
        order = list(range(total))
        random.Random(f"{self._seed}:{role}:{query_id}").shuffle(order)
        start = visit * count
        return [order[(start + offset) % total] for offset in range(count)]

    def _others(self, example: Example, index: int, visit: int) -> np.ndarray:
        """Negatives that are not hard, `(n_others,) int64`; random passages if there are none."""
        if not self._n_others:
            return NO_ROWS
        others = getattr(self._examples, "others", None)  # training files of DPR have them
        pool = others(index) if others else NO_ROWS
        if not len(pool):
            return self._random(example, self._n_others, "other", visit)
        return pool[self._rotated(example.query.id, "others", len(pool), self._n_others, visit)]

    def _random(self, example: Example, count: int, role: str, visit: int) -> np.ndarray:
        """Random passages that are not positives of the query, `(count,) int64`."""
        positives = set(example.positives.tolist())
        n_passages = len(self._examples.passages)
        if not count or len(positives) >= n_passages:
            return np.zeros(count, np.int64)
        generator = random.Random(f"{self._seed}:{role}:{example.query.id}:{visit}")
        rows: list[int] = []
        while len(rows) < count:
            row = generator.randrange(n_passages)
            if row not in positives:
                rows.append(row)
        return np.array(rows)

    def _scores(
        self, query_id: str, scores: np.ndarray | None, chosen: Sequence[int], others: int
    ) -> np.ndarray | None:
        if not self._with_scores:
            return None
        complete = scores is not None and max(chosen) < len(scores) and not others
        if scores is None or not complete or not np.isfinite(scores[list(chosen)]).all():
            raise DataError(
                f"query {query_id!r} lacks a teacher's scores of some passages; the loss needs "
                "them in the training data"
            )
        return scores[list(chosen)]


class LateTokens:
    """Token ids of passages that are read from a document store and tokenised when needed.

    Args:
        store: the passages; it holds text.
        text_tokenizer: makes the token ids.
    """

    def __init__(self, store: DocumentStore, text_tokenizer: TextTokenizer) -> None:
        self._store = store
        self._text_tokenizer = text_tokenizer

    def get_many(self, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids of passages, each `(length,) int64`; one call of the tokenizer for all."""
        return [*map(np.asarray, self._text_tokenizer.passage_ids(self._store.get_many(rows)))]


def check_negatives(examples: Examples, n_passages: int, name: str) -> None:
    """Check, before training, that queries have hard negatives, if they are needed.

    Raises:
        UsageError: no query has any.
    """
    if n_passages == 1:
        return
    counts = examples.negative_counts()
    if not counts.any():
        raise UsageError(
            f"{name}: no query has hard negatives; find some by `mlflow-dr mine`, or train with "
            "in-batch negatives only by --train_n_passages 1"
        )
    if missing := int((counts == 0).sum()):
        log.warning(
            "%s: %d of %d queries have no hard negatives and get random passages instead",
            *(name, missing, len(counts)),
        )
    if few := int((counts[counts > 0] < n_passages - 1).sum()):
        log.info(
            "%s: %d queries have fewer than %d hard negatives and repeat them",
            *(name, few, n_passages - 1),
        )


def training_set(
    examples: Examples,
    tokenizing_queries: TextTokenizer,
    tokenizing_passages: TextTokenizer,
    *,
    store: str | None = None,
    processes: int = 1,
    **options: Any,
) -> TrainingSet:
    """A training set over token tables, which are made at the first use and cached.

    Args:
        examples: the examples.
        tokenizing_queries: how queries are tokenised.
        tokenizing_passages: how passages are tokenised.
        store: the name of the document store from which passages are read and tokenised during
            training; None if all are tokenised once before it.
        processes: largest number of processes that tokenise.
        options: further arguments of `TrainingSet`.
    """
    passages: TokenRows
    if store is None:
        passages = corpus_tokens(examples.passages, tokenizing_passages, processes)
    else:
        documents = open_store(store, store_directory(store, examples.passages))
        documents.opened()  # before workers are forked, which share what is in memory
        passages = LateTokens(documents, tokenizing_passages)
    queries = query_tokens(examples, tokenizing_queries, processes)
    return TrainingSet(examples, queries, passages, **options)


class Collator:
    """Makes a batch of padded token ids from groups.

    Args:
        query_pad_id: token id that pads queries.
        passage_pad_id: token id that pads passages.
    """

    def __init__(self, query_pad_id: int, passage_pad_id: int) -> None:
        self.pad_ids = {QUERY: query_pad_id, PASSAGE: passage_pad_id}

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """A batch.

        Returns:
            `query` and `passage`: token ids and masks, `(n, length)` and `(n * group, length)`;
            `keys`, `(n * group,) int64`; `teacher`, `(n, group) float32`, if all have scores;
            `query_ids`; `n_tokens`, the number of tokens that are not padding; and `lengths`, the
            tokens of each query and passage, by role, as arrays, which stay on the host.
        """
        passages = [passage for group in groups for passage in group.passages]
        batch: dict[str, Any] = {
            QUERY: self._padded([group.query for group in groups], QUERY),
            PASSAGE: self._padded(passages, PASSAGE),
            "keys": torch.from_numpy(np.concatenate([group.keys for group in groups])),
        }
        scores = [group.scores for group in groups if group.scores is not None]
        if len(scores) == len(groups):
            batch["teacher"] = torch.from_numpy(np.stack(scores).astype(np.float32))
        batch[QUERY_IDS] = [group.query_id for group in groups]
        batch[LENGTHS] = {
            QUERY: np.array([len(group.query) for group in groups]),
            PASSAGE: np.array([*map(len, passages)]),
        }
        batch[N_TOKENS] = sum(int(lengths.sum()) for lengths in batch[LENGTHS].values())
        return batch

    def _padded(self, rows: Sequence[np.ndarray], role: str) -> dict[str, Tensor]:
        return padded(rows, self.pad_ids[role])


def padded(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> dict[str, Tensor]:
    """Texts side by side, padded at the right to the longest of them.

    Args:
        rows: token ids of each text.
        pad_id: the token id that pads.

    Returns:
        `input_ids` and `attention_mask` (1 for a token), each `(n_rows, longest) int64`.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def inverse(rows: Sequence[Tensor]) -> Tensor:
    """The position of each row in the concatenation of groups of rows, `(n_rows,) int64`."""
    order = torch.cat(list(rows))
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return positions


def with_lengths(texts: Texts) -> Texts:
    """Texts with their lengths; waits for the device if they must be counted."""
    if texts.get(LENGTHS) is not None:
        return texts
    return {**texts, LENGTHS: texts["attention_mask"].sum(dim=1).cpu().numpy()}


def cut(texts: Texts, rows: np.ndarray) -> tuple[Texts, Tensor]:
    """Some of the texts, without columns that are padding in all of them.

    Args:
        texts: with their lengths.
        rows: which of them, `(n,) int64`.

    Returns:
        These texts, and the rows as a tensor on their device.
    """
    lengths = texts[LENGTHS][rows]
    longest = max(1, int(lengths.max()))
    chosen = on_device(rows, texts["input_ids"].device)
    tensors = {name: values for name, values in texts.items() if name != LENGTHS}
    some = {name: values[chosen, :longest] for name, values in tensors.items()}
    return {**some, LENGTHS: lengths}, chosen
