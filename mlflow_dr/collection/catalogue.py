"""The catalogue: what a `--dataset` may name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.interface import Collection
from mlflow_dr.errors import UsageError

IR_DATASETS_PREFIX = "irds:"


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
    ("irds:ID", "any", "ir_datasets, such as irds:beir/scifact/test or irds:vaswani"),
)


def open_collection(name: str) -> Collection:
    """The collection that a name stands for: a catalogue name, `irds:<id>` or a folder.

    Raises:
        UsageError: nothing goes by that name.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry.opened()
    if name.startswith(IR_DATASETS_PREFIX):
        from mlflow_dr.collection.irds import IrDataset

        return IrDataset(name.removeprefix(IR_DATASETS_PREFIX))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        from mlflow_dr.collection.beir import BeirFolder

        # the whole path, so that a validator in another folder finds it by the same name
        return BeirFolder(folder.resolve())
    names = [entry.name for entry in ENTRIES]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"no dataset {name!r}: {hint}a dataset is one of {', '.join(names)}, a folder in BEIR's "
        "layout, or irds:<id>; `mlflow-dr datasets` lists them"
    )
