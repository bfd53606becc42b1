"""The catalogue: what `--dataset` may name, and how a name is opened."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Collection, DatasetFormat, Examples, dataset_formats
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.files import is_path

log = logging.getLogger(__name__)

IR_DATASETS_PREFIX = "irds:"
POOL_PREFIX = "pool:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

JOIN = "+"
WEIGHT = "@"


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
        module, _, name = self.home.partition(":")
        opener = getattr(import_module(f"mlflow_dr.collection.{module}"), name)
        collection: Collection = opener(_absolute(location) if self.takes_path else location)
        return collection


def _demo() -> Collection:
    from mlflow_dr.collection.demo import demo_collection

    return demo_collection()


def _msmarco() -> Collection:
    from mlflow_dr.collection.hub import msmarco_passage

    return msmarco_passage()


def _is_beir(path: Path) -> bool:
    from mlflow_dr.collection.training_files import has_training_files

    return path.is_dir() and ((path / "qrels").is_dir() or not has_training_files(path))


def _absolute(location: str) -> Path:
    return Path(location).expanduser().resolve()


ENTRIES = (
    Entry(
        "demo",
        "about 20,000 passages, one query each; train and dev split",
        "docstrings of Python and the installed packages, harvested on this machine",
        _demo,
    ),
    Entry(
        "msmarco",
        "8,841,823 passages; train 400,782 and dev 6,980 queries",
        "Hugging Face Tevatron/msmarco-passage and Tevatron/msmarco-passage-corpus; "
        "ir_datasets msmarco-passage/dev/small",
        _msmarco,
    ),
)

BUILT_IN = {
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
        "HUB/NAME",
        "Hugging Face in Tevatron's layout, such as Tevatron/wikipedia-nq",
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
    the name of a dataset format, such as `irds:vaswani`; a file or folder that a format recognises;
    `owner/name` on the Hugging Face hub.

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
    if is_path(name):
        path = _absolute(name)
        recognised = next(form for form in all_formats() if form.recognises(path))
        return recognised.open(str(path))
    if HUB_NAME.fullmatch(name):
        return BUILT_IN["hub"].open(name)
    names = [entry.name for entry in ENTRIES]
    hint = did_you_mean(prefix, [*names, *dataset_formats.names()])
    others = [f"{other}:..." for other in dataset_formats.names() if other not in BUILT_IN]
    expected = [
        *names,
        "a folder in BEIR's layout",
        "a file of training examples",
        "pool:<file>",
        "asyncval:<files>",
        "irds:<id>",
        *others,
    ]
    raise UsageError(
        f"no dataset {name!r}{hint or ';'} a dataset is one of {', '.join(expected)}, or "
        "owner/name on the Hugging Face hub; `mlflow-dr datasets` lists them"
    )


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


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """The names and weights of several training sets: `A@3+B@1`.

    `+` joins the parts, `@` separates a name from its weight. A path that exists is always a name,
    whether it is the complete text or one part, even if it contains these characters.

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
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(
            f"{mixture!r}: the weight of {name!r} is {weight_text!r}, not a positive number"
        )
    return name, weight
