"""What a validator does: which validations, on which checkpoints, in which order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.retrieval.measures import Measure, check_depth
from mlflow_dr.subsets.spec import MOST_DIGITS, RELEVANT, SubsetSpec, parse_subset
from mlflow_dr.tracking.claims import PATIENCE
from mlflow_dr.tracking.validations import FIRST_NAME, Metric
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.policies import Wishes

# what MLflow allows in a metric's name, less the slash and the dot, which have a meaning here
NAME = re.compile(r"[\w\- ]+")
NOT_IN_NAME = re.compile(r"[^\w\- ]")


class Refines(NamedTuple):
    """Which checkpoints a dear validation is worth.

    Attributes:
        name: the cheap validation's.
        measure: by which of its measures.
        best: so many of the best that it has found so far.
    """

    name: str
    measure: Measure
    best: int


@dataclass(frozen=True)
class Validation:
    """What is measured on every checkpoint of a run.

    Attributes:
        settings: measures, depth, device, dtype.
        name: prefixes the metrics.
        dataset: the collection; the run's own when None.
        split: the split; the run's own, or the collection's development split, when None.
        subset: what is searched.
        refines: done for the best checkpoints of another validation only.
    """

    settings: Settings
    name: str = FIRST_NAME
    dataset: str | None = None
    split: str | None = None
    subset: SubsetSpec = field(default_factory=SubsetSpec)
    refines: Refines | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"a validation cannot be called {self.name!r}: letters, digits, _, - and blanks"
            )


@dataclass(frozen=True)
class Asked:
    """What validations are made of; a file may say it for one of them, flags for all.

    Attributes:
        settings: measures, depth, device, dtype.
        dataset: the collection; the run's own when None.
        sets: splits that come with it, such as those of several query files.
        splits: what is measured instead of all of these.
        subsets: what is searched, in words; the whole corpus when there are none.
        seed: of what subsets draw by lot.
        judged: which judged passages are always in them.
        refine: what is done for the best checkpoints besides, such as `full@3`.
    """

    settings: Settings
    dataset: str | None = None
    sets: Sequence[str] = ()
    splits: Sequence[str] = ()
    subsets: Sequence[str] = ()
    seed: int = 0
    judged: str = RELEVANT
    refine: str | None = None

    def validations(self, name: str) -> tuple[Validation, ...]:
        """Those of this name.

        Raises:
            UsageError: words for a subset that say nothing, or a depth below a measure's cut-off.
        """
        check_depth(self.settings.measures, self.settings.depth)
        specs = [parse_subset(one, self.seed, self.judged) for one in self.subsets]
        splits = self.splits or self.sets
        made = each_split(self.settings, name, self.dataset, splits, specs)
        return made + (refining(self.refine, made, self.seed, self.judged) if self.refine else ())


@dataclass(frozen=True)
class Plan:
    """What one validator does.

    Attributes:
        validations: on each checkpoint; those over one corpus encode it once.
        order: which checkpoint comes first.
        every: only steps that this divides.
        max_lag_seconds: no checkpoint that has been READY for longer than this is begun.
        retry_failed: try again what was recorded as failed, once.
        follow: wait for checkpoints; else do what is there, and end.
        poll_seconds: between two looks at the server.
        encoder_changes: what replaces what checkpoints say: fields of `EncoderConfig`, and
            `tokenizer`, a directory or hub name.
        patience_seconds: how long another validator's claim may stand still before it is free.
        keep_up: of the validations, which differ in their subsets, do only the one with the
            largest subset that keeps up with the trainer.
        wishes: what is to follow from the curve.
    """

    validations: tuple[Validation, ...]
    order: Order = Order.OLDEST
    every: int = 1
    max_lag_seconds: float | None = None
    retry_failed: bool = False
    follow: bool = True
    poll_seconds: float = 2.0
    patience_seconds: float = PATIENCE
    encoder_changes: Mapping[str, Any] = field(default_factory=dict)
    keep_up: bool = False
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def cheap(self) -> tuple[Validation, ...]:
        """Those that are done for every checkpoint, not for the best only."""
        return tuple(one for one in self.validations if one.refines is None)

    @property
    def deciding(self) -> dict[str, Metric | None]:
        """Each validation, and the metric whose best it is done for; None for every checkpoint."""
        return {
            one.name: one.refines and Metric(one.refines.name, one.refines.measure.metric)
            for one in self.validations
        }

    def __post_init__(self) -> None:
        said = {key: value for key, value in self.encoder_changes.items() if key != "tokenizer"}
        replace(EncoderConfig(), **said)  # refuses what no encoder takes
        if self.keep_up and len({one.subset for one in self.cheap}) < 2:
            raise UsageError("keep_up chooses among subsets; give --subset at least twice")
        names = [one.name for one in self.validations]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"two validations are called {min(repeated)!r}")
        if self.every < 1:
            raise UsageError(f"every is {self.every}; it must be at least 1")
        for key in ("poll_seconds", "patience_seconds", "max_lag_seconds"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{key} is {value}; it must be a number above 0")


def each_split(
    settings: Settings,
    name: str,
    dataset: str | None,
    splits: Sequence[str],
    subsets: Sequence[SubsetSpec] = (),
) -> tuple[Validation, ...]:
    """A validation of each split and subset.

    Of several splits, each is called NAME-SPLIT. One on a subset is called NAME-SUBSET, so that its
    figures, which are higher, never share a curve with those on the whole corpus.

    Args:
        settings: those of all.
        name: the validation's name, or what their names begin with.
        dataset: the collection; the run's own when None.
        splits: what is measured; the run's own, or the development split, when there are none.
        subsets: what is searched; the whole corpus when there are none.
    """
    named: list[tuple[str, str | None]] = [(name, splits[0] if splits else None)]
    if len(splits) > 1:
        named = [(f"{name}-{NOT_IN_NAME.sub('_', split)}", split) for split in splits]
    return tuple(
        Validation(settings, "-".join(filter(None, (called, spec.slug))), dataset, split, spec)
        for called, split in named
        for spec in subsets or (SubsetSpec(),)
    )


def refining(
    text: str, validations: Sequence[Validation], seed: int = 0, judged: str = RELEVANT
) -> tuple[Validation, ...]:
    """What `--refine full@3` adds: a dear validation of the three best checkpoints so far.

    Args:
        text: a subset, and of how many checkpoints.
        validations: the cheap ones; each is refined by its first measure.
        seed: of what the dear subset draws by lot.
        judged: which judged passages are always in it: the `relevant` ones, or `all`.

    Raises:
        UsageError: not of this form, the same as a cheap one, or one for several of them.
    """
    words, _, count = text.rpartition("@")
    if not words or not count.isdecimal() or len(count) > MOST_DIGITS or int(count) == 0:
        raise UsageError(f"refine {quoted(text)}: expected SUBSET@N, such as full@3")
    spec = parse_subset(words, seed, judged)
    added: list[Validation] = []
    for cheap in validations:
        if cheap.subset == spec:
            raise UsageError(f"refine {text!r} is what validation {cheap.name!r} does already")
        base = cheap.name.removesuffix(f"-{cheap.subset.slug}")
        name = "-".join(filter(None, (base, spec.slug)))
        if name in {one.name for one in added}:
            raise UsageError(
                f"refine {text!r}: validation {name!r} would be of the best by several subsets; "
                "give one --subset"
            )
        refines = Refines(cheap.name, cheap.settings.measures[0], int(count))
        added.append(replace(cheap, name=name, subset=spec, refines=refines))
    return tuple(added)
