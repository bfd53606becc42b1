"""Training queries that are held out, to be validated on: the split `held-out` of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from mlflow_dr.collection.catalogue import Collection, Examples, check_split
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import topics_of_examples
from mlflow_dr.collection.qrels import checked_topics
from mlflow_dr.collection.records import Example, Query, Topics
from mlflow_dr.errors import UsageError
from mlflow_dr.files import digest_of

HELD_OUT = "held-out"


class SomeExamples:
    """Some of a set of training examples, in the same order.

    Args:
        examples: all of them.
        rows: which, ascending, `(n,) int64`.
    """

    def __init__(self, examples: Examples, rows: np.ndarray) -> None:
        self._examples = examples
        self._rows = rows
        self.digest = digest_of(examples.digest, hashlib.sha256(rows.tobytes()).hexdigest())

    @property
    def passages(self) -> Corpus:
        """The corpus whose rows the positives and negatives are."""
        return self._examples.passages

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._examples[int(self._rows[index])]

    def others(self, index: int) -> np.ndarray:
        """Rows of an example's negatives that are not hard, `(n_others,) int64`."""
        others = getattr(self._examples, "others", None)
        return others(int(self._rows[index])) if others else np.empty(0, np.int64)

    def negative_counts(self) -> np.ndarray:
        """How many hard negatives each example has, `(n_examples,) int64`."""
        return self._examples.negative_counts()[self._rows]


class WithHeldOut:
    """A collection with one more split, `held-out`.

    Args:
        collection: has the passages.
        held_out: the queries of the split, with judgements.
    """

    def __init__(self, collection: Collection, held_out: Topics) -> None:
        self.name = collection.name
        self.source = collection.source
        self._collection = collection
        self._held_out = held_out

    @property
    def splits(self) -> Sequence[str]:
        """Those of the collection, and `held-out`."""
        return [*self._collection.splits, HELD_OUT]

    def corpus(self) -> Corpus:
        """The passages of the collection."""
        return self._collection.corpus()

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: the collection has none of the relevant passages.
        """
        check_split(self, split)
        if split != HELD_OUT:
            return self._collection.topics(split)
        queries, qrels = self._held_out
        return checked_topics(f"{self.name}/{HELD_OUT}", queries, qrels, self.corpus())

    def examples(self) -> Examples:
        """The training examples of the collection, with those of held-out queries."""
        return self._collection.examples()


def hold_out(sets: Sequence[Examples], fraction: float, seed: int) -> tuple[list[Examples], Topics]:
    """Hold queries of the first set out of all sets.

    Queries with the same id or the same text are held out together, so that no copy of a held-out
    query is trained on. Which queries are chosen depends on their ids and the seed alone.

    Args:
        sets: of training examples.
        fraction: the share of the queries of the first set, above 0 and below 1.
        seed: of the choice.

    Returns:
        The examples that are left, and the held-out queries with their positives as relevant.

    Raises:
        UsageError: nothing would be left to train on.
    """
    queries = [sets[0][row].query for row in range(len(sets[0]))]
    groups = _groups(queries)
    names = sorted(set(groups), key=lambda name: digest_of(seed, name))
    count = max(1, round(fraction * len(names)))
    chosen = set(names[:count])
    is_held = np.array([group in chosen for group in groups])
    texts = {_text(query) for query, held in zip(queries, is_held, strict=True) if held}
    left = [_without(sets[0], is_held)]
    for other in sets[1:]:  # the ids of another set are of other queries
        rows = range(len(other))
        left.append(_without(other, np.array([_text(other[row].query) in texts for row in rows])))
    if not all(map(len, left)):
        raise UsageError(
            f"--validation_fraction {fraction:g} leaves no query to train on; the first dataset "
            f"has {len(names)}"
        )
    return left, topics_of_examples(sets[0], np.flatnonzero(is_held).tolist())


def _without(examples: Examples, is_held: np.ndarray) -> Examples:
    return SomeExamples(examples, np.flatnonzero(~is_held)) if is_held.any() else examples


def _groups(queries: Sequence[Query]) -> list[str]:
    """The group of each query, named by its smallest id; equal ids or texts are one group."""
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = node = parents[parent]
        return node

    for query in queries:
        # ids are before texts, so the smallest node of a group is an id
        smaller, larger = sorted((root(("id", query.id)), root(("text", _text(query)))))
        parents[larger] = smaller
    return [root(("id", query.id))[1] for query in queries]


def _text(query: Query) -> str:
    """What copies of a query have in common, whatever their case and their blanks."""
    return " ".join(query.text.casefold().split()) or " ".join(map(str, query.tokens or ()))


def check_in_corpus(held_out: Topics, collection: Collection) -> None:
    """Refuse held-out queries whose relevant passages another corpus lacks.

    Raises:
        UsageError: with one of the passages.
    """
    ids: Iterable[str] = dict.fromkeys(pid for judged in held_out.qrels.values() for pid in judged)
    names = list(ids)
    missing = [
        name for name, row in zip(names, collection.corpus().rows_of(names), strict=True) if row < 0
    ]
    if missing:
        raise UsageError(
            f"--validation_fraction: {len(missing)} of {len(names)} positives of the held-out "
            f"queries, such as {missing[0]!r}, are not in {collection.name}; name the training "
            "file by --dataset instead of --train_dir"
        )
