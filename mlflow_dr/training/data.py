"""The training data, mixed from one or more datasets, and the collection to validate on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mlflow_dr.collection.catalogue import (
    Collection,
    Examples,
    chosen_split,
    open_collection,
    open_examples,
    parse_mixture,
)
from mlflow_dr.collection.held_out import HELD_OUT, check_in_corpus, hold_out
from mlflow_dr.collection.records import Topics
from mlflow_dr.collection.suites import suite_members
from mlflow_dr.collection.training_files import TrainingFiles
from mlflow_dr.errors import UsageError
from mlflow_dr.training.arguments import DataArguments
from mlflow_dr.training.batches import Group, TrainingSet
from mlflow_dr.training.flags import upsample_rates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedExamples:
    """The examples of one dataset, with their share of the mixture.

    Attributes:
        name: the dataset's name, as the user gave it.
        source: its location.
        examples: its examples.
        weight: its share, relative to the other datasets; its number of examples when None.
        rate: how often each example is read in an epoch, on average.
    """

    name: str
    source: str
    examples: Examples
    weight: float | None
    rate: int = 1


@dataclass(frozen=True)
class TrainingData:
    """The training data, and the collection to validate on.

    Attributes:
        parts: the datasets to train on, mixed by weight.
        collection: the collection to validate on; None if none has judged queries, or it is a
            suite.
        split: its split.
        held_out: the training queries of that split, with `--validation_fraction`.
    """

    parts: list[WeightedExamples]
    collection: Collection | None
    split: str
    held_out: Topics | None = None


def open_data(arguments: DataArguments, seed: int = 0) -> TrainingData:
    """Open the datasets that the flags name.

    Args:
        arguments: the flags.
        seed: of the queries that are held out.

    Raises:
        UsageError: there is no such dataset or split, a dataset has no training examples, or flags
            contradict each other.
        DataError: a file is missing, malformed or contradicts itself.
    """
    named = parse_mixture(arguments.dataset_name)
    if arguments.train_dir is not None and len(named) > 1:
        raise UsageError(
            f"--train_dir replaces the examples of one collection, but {arguments.dataset_name!r} "
            "names several; name the files in the mixture instead"
        )
    rates = _rates(arguments, [weight for _, weight in named])
    collections = [open_collection(name) for name, _ in named]
    validated = _validated(arguments, collections)
    split = ""
    if validated is not None and not arguments.validation_fraction:
        split = chosen_split(validated, arguments.validation_split)
    if arguments.train_dir is not None:
        if arguments.other_negatives:
            raise UsageError(
                "--other_negatives cannot be used with --train_dir; name the file by --dataset"
            )
        path = Path(arguments.train_dir).expanduser()
        examples = open_examples(path, collections[0].corpus)
        parts = [WeightedExamples(str(path), str(path.resolve()), examples, None, rates[0])]
    else:
        parts = [
            WeightedExamples(
                collection.name,
                collection.source,
                _examples(collection, arguments.other_negatives),
                weight,
                rate,
            )
            for collection, (_, weight), rate in zip(collections, named, rates, strict=True)
        ]
    if arguments.validation_fraction:
        return _holding_out(parts, collections[0], arguments, seed)
    return TrainingData(parts, validated, split)


def _holding_out(
    parts: Sequence[WeightedExamples], collection: Collection, arguments: DataArguments, seed: int
) -> TrainingData:
    """The data with a share of the first dataset's queries held out, to be validated on."""
    fraction = arguments.validation_fraction or 0.0
    left, held_out = hold_out([part.examples for part in parts], fraction, seed)
    if arguments.train_dir is not None:
        check_in_corpus(held_out, collection)
    kept = [replace(part, examples=examples) for part, examples in zip(parts, left, strict=True)]
    log.info("%d queries are held out of training, to be validated on", len(held_out.queries))
    return TrainingData(kept, collection, HELD_OUT, held_out)


def _examples(collection: Collection, n_others: int) -> Examples:
    """A collection's examples, with other negatives if they are needed."""
    if not n_others:
        return collection.examples()
    if not isinstance(collection, TrainingFiles):
        raise UsageError(
            f"{collection.name} has only hard negatives; --other_negatives needs a training file "
            "of DPR"
        )
    return collection.with_others().examples()


def _rates(arguments: DataArguments, weights: Sequence[float | None]) -> list[int]:
    """How often each dataset is read in an epoch."""
    rates = upsample_rates(arguments.train_files_upsample_rates)
    if not rates:
        return [1] * len(weights)
    if len(rates) != len(weights):
        raise UsageError(
            f"--train_files_upsample_rates has {len(rates)} rates, but {arguments.dataset_name} "
            f"has {len(weights)} datasets"
        )
    if any(weight is not None for weight in weights):
        raise UsageError(
            f"--train_files_upsample_rates cannot be used with weights ({arguments.dataset_name})"
        )
    return rates


def validated_dataset(arguments: DataArguments) -> str:
    """What validators search: the name of a collection or of a suite.

    Raises:
        UsageError: no dataset that the flags name has judged queries.
    """
    names = [name for name, _ in parse_mixture(arguments.dataset_name)]
    collection = _validated(arguments, [open_collection(name) for name in names])
    if collection is not None:
        return collection.name
    if arguments.validation_dataset is not None:
        return arguments.validation_dataset
    raise UsageError(
        f"{arguments.dataset_name} has no judged queries; name a collection that has some by "
        "--validation_dataset, or train without validation by `mlflow-dr train`"
    )


def _validated(arguments: DataArguments, trained: Sequence[Collection]) -> Collection | None:
    """The collection to validate on; None if none has judged queries, or a suite was named."""
    if arguments.validation_fraction:
        if other := arguments.validation_dataset or arguments.validation_split:
            raise UsageError(
                f"--validation_fraction validates on held-out training queries, not on {other}; "
                "leave one of them out (more validations: `mlflow-dr validate --name NAME`)"
            )
        return trained[0]
    if arguments.validation_dataset is None:
        return next((collection for collection in trained if collection.splits), None)
    if suite_members(arguments.validation_dataset):
        if arguments.validation_split:
            raise UsageError(
                f"--validation_split {arguments.validation_split} is of one collection; in a suite "
                "name the split of each: OWNER/NAME:SPLIT, or `split` in its file"
            )
        return None
    named = open_collection(arguments.validation_dataset)
    if not named.splits:
        raise UsageError(f"--validation_dataset {named.name} has no judged queries")
    return named


class Mixture(Dataset[Group]):
    """Several training sets as one.

    Each set has its share of an epoch. It continues where the epoch before ended, and shuffles its
    examples for each pass. So a small set with a large weight is read several times in an epoch,
    each time with its next positives and negatives.

    Args:
        parts: the training sets.
        weights: the share of each set, relative to the others.
        seed: random seed of the order.
        total: examples of an epoch; the number of all examples when None.
    """

    def __init__(
        self,
        parts: Sequence[TrainingSet],
        weights: Sequence[float],
        seed: int,
        total: int | None = None,
    ) -> None:
        self._parts = parts
        self._seed = seed
        self._counts = _shares(total or sum(map(len, parts)), weights)
        self._starts = np.cumsum([0, *self._counts])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def set_epoch(self, epoch: int) -> None:
        """Choose examples for this epoch; `RetrieverTrainer` calls this before each epoch."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Group:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Group]:
        visits = [self._visit(index) for index in indices]
        groups: list[Group | None] = [None] * len(visits)
        for part in {part for part, _ in visits}:
            mine = [place for place, (other, _) in enumerate(visits) if other == part]
            read = self._parts[part].groups([visits[place][1] for place in mine])
            for place, group in zip(mine, read, strict=True):
                groups[place] = group
        return [group for group in groups if group is not None]

    def _visit(self, index: int) -> tuple[int, tuple[int, int]]:
        """The part of an example of the mixture, its index there, and which visit this is."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = int(self._epoch) * self._counts[part] + index - int(self._starts[part])
        visit, position = divmod(position, len(self._parts[part]))
        return part, (int(self._order(part, visit)[position]), visit)

    def _order(self, part: int, visit: int) -> np.ndarray:
        if (part, visit) not in self._orders:
            for old in [key for key in self._orders if key[0] == part and key[1] < visit - 1]:
                del self._orders[old]
            generator = np.random.default_rng([self._seed, part, visit])
            self._orders[part, visit] = generator.permutation(len(self._parts[part]))
        return self._orders[part, visit]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in the proportion of the weights."""
    ends = np.round(np.cumsum(weights) / sum(weights) * total).astype(int)
    return np.diff([0, *ends.tolist()]).tolist()
