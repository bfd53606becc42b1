"""The built-in collection `demo`: docstrings of Python and of the installed packages.

This is real text that every machine has already: the first paragraph of a docstring is the query,
and the rest is its one relevant passage.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.docstrings import harvest
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of

LAYOUT = 1
"""Raise it when the rules below change, so that a collection cached before is not used."""

PACKAGES = (
    "numpy",
    "torch",
    "pandas",
    "mlflow",
    "transformers",
    "datasets",
    "pyarrow",
    "huggingface_hub",
)
FEWEST_PAIRS = 100
DEV_SHARE = 20
"""One pair in this many is in the dev split."""


class Source(NamedTuple):
    """A tree of Python files, and the version that names its contents."""

    name: str
    version: str
    root: Path


def demo_collection() -> BeirFolder:
    """The demo collection, harvested into the user's cache on first use.

    The same Python and package versions give the same collection.

    Raises:
        DataError: fewer than `FEWEST_PAIRS` docstrings are usable.
    """
    sources = installed_sources()
    versions = [f"{source.name} {source.version}" for source in sources]
    folder = cache_entry(
        "demo",
        digest_of(LAYOUT, *versions),
        lambda partial: write_demo(partial, [source.root for source in sources]),
    )
    return BeirFolder(folder, name="demo", source=f"docstrings of {', '.join(versions)}")


def installed_sources() -> list[Source]:
    """Python's standard library and those of `PACKAGES` that are installed, sorted by name."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [Source("python", platform.python_version(), library)]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: a stray folder of that name
            continue
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            sources.append(Source(name, version, Path(spec.origin).parent))
    return sorted(sources)


def write_demo(folder: Path, roots: Sequence[Path], workers: int | None = None) -> None:
    """Write the docstrings under `roots` as a new BEIR folder.

    Raises:
        DataError: fewer than `FEWEST_PAIRS` pairs are found, or a worker process dies.
    """
    pairs = harvest(roots, workers)
    if len(pairs) < FEWEST_PAIRS:
        raise DataError(
            f"the demo collection needs {FEWEST_PAIRS} docstrings and found {len(pairs)} under "
            f"{', '.join(map(str, roots))}; is this Python installed without its sources? "
            "Name another --dataset"
        )
    (folder / "qrels").mkdir(parents=True)
    names = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv")
    lines: dict[str, list[bytes]] = {name: [] for name in names}
    for split in ("train", "dev"):
        lines[f"qrels/{split}.tsv"].append(b"query-id\tcorpus-id\tscore")
    for number, (query, passage) in enumerate(pairs):
        record = {"_id": f"p{number}", "title": "", "text": passage}
        lines["corpus.jsonl"].append(msgspec.json.encode(record))
        lines["queries.jsonl"].append(msgspec.json.encode({"_id": f"q{number}", "text": query}))
        lines[f"qrels/{_split(query)}.tsv"].append(b"q%d\tp%d\t1" % (number, number))
    for name, content in lines.items():
        (folder / name).write_bytes(b"\n".join(content) + b"\n")


def _split(query: str) -> str:
    """The split by the query's hash, so that a new package version moves no query between them."""
    number = int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big")
    return "dev" if number % DEV_SHARE == 0 else "train"
