"""The catalogue: what a `--dataset` may name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.asyncval import PREFIX as ASYNCVAL_PREFIX
from mlflow_dr.collection.asyncval import asyncval_files
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Collection, Examples
from mlflow_dr.errors import UsageError
from mlflow_dr.files import is_path

IR_DATASETS_PREFIX = "irds:"
POOL_PREFIX = "pool:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Entry(NamedTuple):
    """One named collection: what it is and how it is opened."""

    name: str
    sizes: str
    source: str
    opened: Callable[[], Collection]


def _demo() -> Collection:
    from mlflow_dr.collection.demo import demo_collection

    return demo_collection()


def _msmarco() -> Collection:
    from mlflow_dr.collection.hub import msmarco_passage

    return msmarco_passage()


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

PATTERNS = (
    ("FOLDER", "any", "a folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv"),
    (
        "FILE",
        "any",
        "training examples, or a folder of such files: Tevatron's (with passages, by id, "
        "tokenised) or DPR's",
    ),
    ("irds:ID", "any", "ir_datasets, such as irds:beir/scifact/test or irds:vaswani"),
    (
        "asyncval:",
        "any",
        "Asyncval's files, asyncval:CANDIDATES?queries=FILE&qrels=FILE; or by --candidate-dir, "
        "--query-file, --qrel-file",
    ),
    (
        "pool:FILE",
        "any",
        "questions of training examples, judged on the passages of all: DPR's dev files",
    ),
    ("HUB/NAME", "any", "Hugging Face in Tevatron's layout, such as Tevatron/wikipedia-nq"),
)


def open_collection(name: str) -> Collection:
    """The collection that a name stands for.

    A name of the catalogue, `irds:<id>`, `asyncval:<files>`, `pool:<file>`, a folder in BEIR's
    layout, a file or folder of training examples (which has no judged queries), or `owner/name` on
    the Hugging Face hub, in this order.

    Raises:
        UsageError: nothing goes by that name.
    """
    return _opened(name, None)


def open_examples(source: str | Path, corpus: Callable[[], Corpus] | None = None) -> Examples:
    """The training examples of whatever `open_collection` opens.

    Args:
        source: a name, file or folder.
        corpus: has the passages of a file that names them by id and has no corpus beside it.

    Raises:
        UsageError: nothing goes by that name, or it has nothing to train on.
        DataError: the examples are malformed, of no known layout, or none is usable.
    """
    return _opened(str(source), corpus).examples()


def _opened(name: str, corpus: Callable[[], Corpus] | None) -> Collection:
    for entry in ENTRIES:
        if entry.name == name:
            return entry.opened()
    if name.startswith(IR_DATASETS_PREFIX):
        from mlflow_dr.collection.irds import IrDataset

        return IrDataset(name.removeprefix(IR_DATASETS_PREFIX))
    if name.startswith(ASYNCVAL_PREFIX):
        return asyncval_files(name)
    if name.startswith(POOL_PREFIX):
        from mlflow_dr.collection.training_files import passage_pool

        return passage_pool(name)
    if is_path(name):
        # the whole path, so that a validator in another folder finds it by the same name
        return _opened_path(Path(name).expanduser().resolve(), corpus)
    if HUB_NAME.fullmatch(name):
        from mlflow_dr.collection.hub import hub_collection

        return hub_collection(name)
    names = [entry.name for entry in ENTRIES]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"no dataset {name!r}: {hint}a dataset is one of {', '.join(names)}, a folder in BEIR's "
        "layout, a file of training examples, pool:<file>, asyncval:<files>, irds:<id>, or "
        "owner/name on the "
        "Hugging Face hub; `mlflow-dr datasets` lists them"
    )


def _opened_path(path: Path, corpus: Callable[[], Corpus] | None) -> Collection:
    from mlflow_dr.collection.beir import BeirFolder
    from mlflow_dr.collection.training_files import TrainingFiles, has_training_files

    beir = path.is_dir() and ((path / "qrels").is_dir() or not has_training_files(path))
    return BeirFolder(path) if beir else TrainingFiles(path, corpus)


JOIN = "+"
WEIGHT = "@"


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """The names in `text` and their weights, None where one has no weight of its own.

    `+` joins, `@` sets a name and its weight apart. What is a path that exists is a name, whatever
    is in it, be it the whole text or one part with its `@`.

    Raises:
        UsageError: a name is empty, or a weight is no positive number.
    """
    if is_path(text):
        return [(text, None)]
    return [_part(part, text) for part in text.split(JOIN)]


def _part(part: str, whole: str) -> tuple[str, float | None]:
    part = part.strip()
    if is_path(part):
        return part, None
    name, at, weight = part.rpartition(WEIGHT) if WEIGHT in part else (part, "", "")
    if not name.strip():
        raise UsageError(
            f"dataset {whole!r}: a part without a name; a mixture is NAME@WEIGHT+NAME@WEIGHT, "
            "weights may be left out"
        )
    return name.strip(), _weight(weight, name, whole) if at else None


def _weight(text: str, name: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"{whole!r}: the weight of {name!r} is {text!r}, not a positive number")
    return weight
