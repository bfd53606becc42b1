"""The one interface that every format of a collection offers, and the choice of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Topics
from mlflow_dr.errors import UsageError, did_you_mean


class Examples(Protocol):
    """Training examples by index; reading one costs one look-up, never the whole set."""

    @property
    def digest(self) -> str:
        """Names the contents, in at most 36 characters."""

    @property
    def passages(self) -> Corpus:
        """What the examples' positives and negatives are rows of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def negative_counts(self) -> np.ndarray:
        """How many hard negatives each example has, `(n_examples,) int64`."""


class Collection(Protocol):
    """A test collection. Nothing is read before it is asked for."""

    @property
    def name(self) -> str:
        """What the user called it: a catalogue name or a folder path."""

    @property
    def source(self) -> str:
        """Where it comes from, in words that another person can follow."""

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries."""

    def corpus(self) -> Corpus:
        """The passages."""

    def topics(self, split: str) -> Topics:
        """The judged queries of one split, checked against the corpus."""

    def examples(self) -> Examples:
        """The training examples."""


PREFERRED_SPLITS = ("dev", "validation", "valid", "val", "test")


def check_split(collection: Collection, split: str) -> None:
    """Refuse a split that a collection does not have.

    Raises:
        UsageError: with the splits that it has.
    """
    if split not in collection.splits:
        splits = ", ".join(collection.splits) or "none, only training examples"
        near = did_you_mean(split, collection.splits) or ";"
        raise UsageError(f"{collection.name} has no split {split!r}{near} it has: {splits}")


def validation_split(splits: Sequence[str]) -> str:
    """The split to validate on when none is named: a development split before the test split."""
    for name in PREFERRED_SPLITS:
        if name in splits:
            return name
    return splits[0]


def chosen_split(collection: Collection, asked: str | None) -> str:
    """The split that was asked for, or the one to validate on when none was.

    Raises:
        UsageError: the collection does not have the split that was asked for, or has none.
    """
    if not (asked or collection.splits):
        raise UsageError(
            f"{collection.name} has no judged queries to validate on, only training examples; "
            "name a collection that has some"
        )
    split = asked or validation_split(collection.splits)
    check_split(collection, split)
    return split
