"""The catalogue: what `--dataset` may name, and how a name is opened.

It is also the extension point for dataset formats. A format is registered under a name, by a
decorator or as an entry point of the group `mlflow_dr.dataset_formats`; the formats of this package
are registered in the same way.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.locations import hub_name
from mlflow_dr.collection.records import Example, Topics
from mlflow_dr.collection.suites import suite_members
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.extensions import Registry
from mlflow_dr.files import is_path

log = logging.getLogger(__name__)

IR_DATASETS_PREFIX = "irds:"
POOL_PREFIX = "pool:"

DATA_VARIABLE = "MLFLOW_DR_DATA"
"""Names folders in which datasets are looked up by name."""

JOIN = "+"
WEIGHT = "@"
LENGTH_OF_COMMIT = 40
PREFERRED_SPLITS = ("dev", "validation", "valid", "val", "test")


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


class Entry(NamedTuple):
    """One named collection: what it is and how it is opened."""

    name: str
    sizes: str
    source: str
    open: Callable[[], Collection]


class BuiltInFormat(NamedTuple):
    """A dataset format of this package; its module is imported when a dataset is opened.

    Attributes:
        pattern: see `DatasetFormat`.
        description: see `DatasetFormat`.
        home: the module and what opens a location there, as in an entry point.
        takes_path: whether the location is a path.
        recognises: see `DatasetFormat`.
    """

    pattern: str
    description: str
    home: str
    takes_path: bool = False
    recognises: Callable[[Path], bool] = lambda path: False

    def open(self, location: str, /) -> Collection:
        """The collection of a location; a path is made absolute, so that it is valid everywhere."""
        return _opened(self.home, _absolute(location) if self.takes_path else location)


def _opened(home: str, *location: str | Path) -> Collection:
    """What a function or class of this room opens; its module is imported first."""
    module, _, name = home.partition(":")
    collection: Collection = getattr(import_module(f"mlflow_dr.collection.{module}"), name)(
        *location
    )
    return collection


def _is_beir(path: Path) -> bool:
    from mlflow_dr.collection.training_files import has_training_files

    return path.is_dir() and ((path / "qrels").is_dir() or not has_training_files(path))


def _is_question_folder(path: Path) -> bool:
    from mlflow_dr.collection.question_answering import question_files

    has_passages = path.is_dir() and any(path.glob("psgs*.tsv*"))
    return has_passages and not (path / "qrels").is_dir() and bool(question_files(path))


def _absolute(location: str) -> Path:
    return Path(location).expanduser().resolve()


ENTRIES = (
    Entry(
        "demo",
        "about 20,000 passages, one query each; train and dev split",
        "docstrings of Python and the installed packages, harvested on this machine",
        partial(_opened, "demo:demo_collection"),
    ),
    Entry(
        "demo-qa",
        "about 4,000 passages, one question with an answer each; train and dev split",
        "passages of demo that have a ``term``, which is the answer",
        partial(_opened, "demo:question_demo"),
    ),
    Entry(
        "msmarco",
        "8,841,823 passages; train 400,782 and dev 6,980 queries",
        "Hugging Face Tevatron/msmarco-passage and Tevatron/msmarco-passage-corpus; "
        "ir_datasets msmarco-passage/dev/small",
        partial(_opened, "hub:msmarco_passage"),
    ),
    Entry(
        "nq",
        "21,015,324 passages of Wikipedia; train 58,880, dev 8,757 and test 3,610 questions",
        "DPR's published files of Natural Questions; passages 4.4 GiB, examples 2.2 GiB (gzip)",
        partial(_opened, "question_answering:nq"),
    ),
    Entry(
        "trivia",
        "21,015,324 passages of Wikipedia; train 60,413, dev 8,837 and test 11,313 questions",
        "DPR's published files of TriviaQA; passages 4.4 GiB, examples 1.7 GiB (gzip)",
        partial(_opened, "question_answering:trivia"),
    ),
)

BUILT_IN = {
    "dpr": BuiltInFormat(
        "dpr:PASSAGES?queries=FILE[,FILE]",
        "DPR's passages (psgs*.tsv) and questions with answers; or a folder with both (*qas*)",
        "question_answering:question_location",
        recognises=_is_question_folder,
    ),
    "beir": BuiltInFormat(
        "FOLDER",
        "a folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv",
        "beir:BeirFolder",
        True,
        _is_beir,
    ),
    "examples": BuiltInFormat(
        "FILE",
        "training examples, or a folder of such files: Tevatron's (with passages, by id, "
        "tokenised) or DPR's",
        "training_files:TrainingFiles",
        True,
        lambda path: True,
    ),
    "irds": BuiltInFormat(
        "irds:ID", "ir_datasets, such as irds:beir/scifact/test or irds:vaswani", "irds:IrDataset"
    ),
    "asyncval": BuiltInFormat(
        "asyncval:CANDIDATES?queries=FILE&qrels=FILE",
        "Asyncval's files; or by --candidate-dir, --query-file, --qrel-file",
        "asyncval:asyncval_files",
    ),
    "pool": BuiltInFormat(
        "pool:FILE",
        "questions of training examples, judged on the passages of all: DPR's dev files",
        "training_files:PassagePool",
        True,
    ),
    "hub": BuiltInFormat(
        "OWNER/NAME[/CONFIG][@REVISION][:SPLIT]",
        "Hugging Face hub, such as mteb/scifact or Tevatron/wikipedia-nq: collections of BEIR, "
        "MTEB, NanoBEIR, MIRACL and BRIGHT, and training examples",
        "hub:hub_collection",
    ),
}
for _name, _format in BUILT_IN.items():
    dataset_formats.register(_name)(_format)


def all_formats() -> Iterator[DatasetFormat]:
    """Formats of other packages, then those of this one; one that cannot be imported is logged."""
    for name in dataset_formats.names():
        if name not in BUILT_IN:
            try:
                yield dataset_formats.get(name)
            except UsageError as error:
                log.warning("skipped: %s", error)
    yield from BUILT_IN.values()


def open_collection(name: str) -> Collection:
    """The collection that a name stands for.

    The name is one of these, tried in this order: a name of the catalogue; `FORMAT:LOCATION` with
    the name of a dataset format, such as `irds:vaswani`; a file or folder that a format recognises,
    in the current directory or in a folder of `$MLFLOW_DR_DATA`; `owner/name` on the Hugging Face
    hub, also with a configuration, revision and split.

    Raises:
        UsageError: no dataset has this name.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry.open()
    prefix, colon, location = name.partition(":")
    if colon and prefix in dataset_formats:
        if not location:
            pattern = dataset_formats.get(prefix).pattern
            raise UsageError(f"dataset {name!r}: nothing follows the colon; expected {pattern}")
        return dataset_formats.get(prefix).open(location)
    path = dataset_path(name)
    if path is not None and not name.endswith((".yaml", ".yml")):
        recognised = next(form for form in all_formats() if form.recognises(path))
        return recognised.open(str(path))
    if hub_name(name):
        return BUILT_IN["hub"].open(name)
    if members := suite_members(name):
        raise UsageError(
            f"{name} is a suite of {len(members)} collections; this takes one of them, such as "
            f"{members[0].settings['dataset']}"
        )
    names = [entry.name for entry in ENTRIES]
    hint = did_you_mean(prefix, [*names, *dataset_formats.names()])
    others = [f"{other}:..." for other in dataset_formats.names() if other not in BUILT_IN]
    expected = [
        *names,
        "a folder in BEIR's layout",
        "a file of training examples",
        "pool:<file>",
        "asyncval:<files>",
        "dpr:<files>",
        "irds:<id>",
        *others,
    ]
    raise UsageError(
        f"no dataset {name!r}{hint or ';'} a dataset is one of {', '.join(expected)}, or "
        "owner/name on the Hugging Face hub; `mlflow-dr datasets` lists them"
    )


def dataset_path(name: str) -> Path | None:
    """The file or folder that a name stands for; None if there is none.

    A relative name is looked up in the current directory, then in the folders of
    `$MLFLOW_DR_DATA`, which are separated as those of `$PATH`.
    """
    if is_path(name):
        return _absolute(name)
    for folder in filter(None, os.environ.get(DATA_VARIABLE, "").split(os.pathsep)):
        if name and is_path(os.path.join(folder, name)):  # noqa: PTH118 - may be no path at all
            return _absolute(os.path.join(folder, name))  # noqa: PTH118
    return None


def open_examples(source: str | Path, corpus: Callable[[], Corpus] | None = None) -> Examples:
    """The training examples of anything that `open_collection` opens.

    Args:
        source: a name, file or folder.
        corpus: has the passages of a file that names them by id and has no corpus beside it.

    Raises:
        UsageError: no dataset has this name, or it has nothing to train on.
        DataError: the examples are malformed, of no known layout, or none is usable.
    """
    from mlflow_dr.collection.training_files import TrainingFiles

    collection = open_collection(str(source))
    if isinstance(collection, TrainingFiles):
        collection = TrainingFiles(Path(collection.name), corpus)
    return collection.examples()


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


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """The names and weights of several training sets: `A@3+B@1`.

    `+` joins the parts, `@` separates a name from its weight. A path that exists is always a name,
    whether it is the complete text or one part, even if it contains these characters. What follows
    the `@` of a name on the hub and is no number is its revision.

    Returns:
        Names and weights; None for a name without a weight.

    Raises:
        UsageError: a name is empty, or a weight is not a positive number.
    """
    if is_path(text):
        return [(text, None)]
    return [_part(part.strip(), text) for part in text.split(JOIN)]


def _part(part: str, mixture: str) -> tuple[str, float | None]:
    if is_path(part):
        return part, None
    name, at, weight_text = part.rpartition(WEIGHT) if WEIGHT in part else (part, "", "")
    name = name.strip()
    if not name:
        raise UsageError(
            f"dataset {mixture!r}: a part without a name; a mixture is NAME@WEIGHT+NAME@WEIGHT, "
            "weights may be left out"
        )
    if not at:
        return name, None
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    if hub_name(part) and (math.isnan(weight) or len(weight_text) == LENGTH_OF_COMMIT):
        return part, None  # a revision
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(
            f"{mixture!r}: the weight of {name!r} is {weight_text!r}, not a positive number"
        )
    return name, weight
