"""The records of a test collection, and the one interface every format offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mlflow_dr.errors import UsageError
from mlflow_dr.files import digest_of

if TYPE_CHECKING:
    from mlflow_dr.collection.corpus import Corpus

Qrels = Mapping[str, Mapping[str, int]]
"""query id -> passage id -> relevance; a passage is relevant when its relevance is above 0."""


class Passage(NamedTuple):
    """One document of the corpus."""

    id: str
    title: str
    text: str


class Query(NamedTuple):
    """One question put to the corpus."""

    id: str
    text: str


class Example(NamedTuple):
    """One training example: a query, at least one relevant passage, and hard negatives, if any."""

    query: Query
    positives: Sequence[Passage]
    negatives: Sequence[Passage]


class Examples(Protocol):
    """Training examples by index; reading one costs one look-up, never the whole set."""

    @property
    def digest(self) -> str:
        """Names the contents, in at most 36 characters."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Topics(NamedTuple):
    """The queries of one split and their relevance judgements, each query judged at least once."""

    queries: Sequence[Query]
    qrels: Qrels

    @property
    def digest(self) -> str:
        """Digest of the queries' ids and texts and of their judgements, whatever their order."""
        lines = sorted(
            f"{query.id}\t{query.text}\t{sorted(self.qrels[query.id].items())}"
            for query in self.queries
        )
        return digest_of(*lines)


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
        raise UsageError(
            f"{collection.name} has no split {split!r}; it has: {', '.join(collection.splits)}"
        )


def validation_split(splits: Sequence[str]) -> str:
    """The split to validate on when none is named: a development split before the test split."""
    for name in PREFERRED_SPLITS:
        if name in splits:
            return name
    return splits[0]
