"""The extension point for dataset formats, and the interface of an opened dataset.

A format is registered under a name, by a decorator or as an entry point of the group
`mlflow_dr.dataset_formats`; `open_collection` finds it. The formats of this package are registered
in the same way (`catalogue.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Topics
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.extensions import Registry


class Examples(Protocol):
    """Training examples by index. Reading one is a look-up and never reads the whole set.

    It is sent to the worker processes of a data loader, so it must be picklable.
    `CachedExamples` and `JudgedExamples` in `examples.py` implement it.
    """

    @property
    def digest(self) -> str:
        """Identifies the contents: equal for equal contents; at most 36 characters."""

    @property
    def passages(self) -> Corpus:
        """The corpus whose rows the positives and negatives are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def negative_counts(self) -> np.ndarray:
        """How many hard negatives each example has, `(n_examples,) int64`."""


class Collection(Protocol):
    """An opened dataset: passages, judged queries by split, and training examples.

    Opening reads nothing large: each method reads what it needs when it is called, and reports
    malformed input as a `DataError` with file:line. A dataset may lack judged queries (then
    `splits` is empty) or training examples (then `examples` raises `UsageError`).
    """

    @property
    def name(self) -> str:
        """What `open_collection` opens again, also from another folder of this machine."""

    @property
    def source(self) -> str:
        """Where the dataset comes from, as text for people; shown in MLflow."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that have judged queries, such as `dev` and `test`."""

    def corpus(self) -> Corpus:
        """The passages; `cached_corpus` in `corpus.py` makes them of an iterable, once."""

    def topics(self, split: str) -> Topics:
        """The judged queries of one split; `checked_topics` in `qrels.py` checks them.

        Raises:
            UsageError: there is no such split.
        """

    def examples(self) -> Examples:
        """The training examples; `cached_examples` in `examples.py` makes them, once.

        Raises:
            UsageError: the dataset has none.
        """


class DatasetFormat(Protocol):
    """What another package implements to add a dataset format.

    A format that is registered as `lines` opens every dataset that is named `lines:LOCATION`. If it
    also recognises files or folders, it opens those by their path alone. An instance, a class with
    static methods or a module can be registered.
    """

    @property
    def pattern(self) -> str:
        """How the names of its datasets look, such as `lines:FILE`; shown by `datasets`."""

    @property
    def description(self) -> str:
        """What such a dataset consists of, on one line; shown by `datasets`."""

    def recognises(self, path: Path, /) -> bool:
        """Whether an existing file or folder is in this format.

        This is called for each path that a user names, before the built-in formats are tried, so it
        must be quick: look at names of files and not at their contents. Return False to open
        datasets by the prefix only.
        """

    def open(self, location: str, /) -> Collection:
        """Open a dataset without reading anything large.

        Args:
            location: what stands behind the prefix, or the absolute path that was recognised.

        Raises:
            UsageError: there is no such dataset.
        """


dataset_formats: Registry[DatasetFormat] = Registry("dataset format", "mlflow_dr.dataset_formats")


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
    return next((name for name in PREFERRED_SPLITS if name in splits), splits[0])


def chosen_split(collection: Collection, requested: str | None) -> str:
    """The requested split, or the one to validate on when none is requested.

    Raises:
        UsageError: the collection does not have the requested split, or has none at all.
    """
    if not (requested or collection.splits):
        raise UsageError(
            f"{collection.name} has no judged queries to validate on, only training examples; "
            "name a collection that has some"
        )
    split = requested or validation_split(collection.splits)
    check_split(collection, split)
    return split
