"""The built-in collection `demo`: docstrings of Python and of the installed packages.

This is real text that every machine has already: the first paragraph of a docstring is the query,
and the rest is its one relevant passage. The sources are parsed by several processes and never
imported. This module imports nothing heavy, because every worker process imports it.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from mlflow_dr.cache import cache_entry
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of, usable_cores
from mlflow_dr.progress import progress_bar

if TYPE_CHECKING:
    from mlflow_dr.collection.beir import BeirFolder

log = logging.getLogger(__name__)

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

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

QUERY_WORDS = range(4, 65)
QUERY_CHARACTERS = 600
PASSAGE_WORDS = 8
PASSAGE_CHARACTERS = 20_000

MOST_WORKERS = 16
WORKER = "from mlflow_dr.collection.demo import _work; _work()"

BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
TERM = re.compile(r"``([^`\n]+)``")
TERM_CHARACTERS = range(2, 41)
CONSTANTS = {"None", "True", "False"}
"""Terms that nearly every passage has."""

PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


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
    from mlflow_dr.collection.beir import BeirFolder  # workers do not need it

    sources = installed_sources()
    versions = [f"{source.name} {source.version}" for source in sources]
    folder = cache_entry(
        "demo",
        digest_of(LAYOUT, *versions),
        lambda partial: write_demo(partial, [source.root for source in sources]),
        f"docstrings of {len(sources)} packages",
    )
    return BeirFolder(folder, name="demo", source=f"docstrings of {', '.join(versions)}")


def question_demo() -> BeirFolder:
    """The queries of the demo collection whose passages have an answer, with that answer.

    The answer is the first term that the passage puts into double back quotes, such as ``axis``.

    Raises:
        DataError: as `demo_collection`.
    """
    from mlflow_dr.collection.beir import BeirFolder

    whole = demo_collection()
    folder = cache_entry(
        "demo-qa",
        digest_of(LAYOUT, whole.source),
        lambda partial: write_questions(partial, whole),
        "terms in docstrings",
    )
    source = f"terms in {whole.source}"
    return BeirFolder(folder, name="demo-qa", source=source)


def write_questions(folder: Path, whole: BeirFolder) -> None:
    """Write the queries whose passages have an answer as a new BEIR folder."""
    corpus = whole.corpus()
    texts = {passage.id: passage.text for batch in corpus.batches() for passage in batch}
    pairs = []
    for split in whole.splits:
        topics = whole.topics(split)
        for query in topics.queries:
            passage = texts[next(iter(topics.qrels[query.id]))]
            if answer := next(filter(_is_answer, TERM.findall(passage)), None):
                pairs.append(Pair(query.text, passage, answer))
    _write_pairs(folder, pairs)


def _is_answer(term: str) -> bool:
    return len(term) in TERM_CHARACTERS and term == term.strip() and term not in CONSTANTS


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
    _write_pairs(folder, pairs)


def _write_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    (folder / "qrels").mkdir(parents=True)
    names = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv")
    lines: dict[str, list[bytes]] = {name: [] for name in names}
    for split in ("train", "dev"):
        lines[f"qrels/{split}.tsv"].append(b"query-id\tcorpus-id\tscore")
    for number, (query, passage, answer) in enumerate(pairs):
        record = {"_id": f"p{number}", "title": "", "text": passage}
        lines["corpus.jsonl"].append(msgspec.json.encode(record))
        answers = {"answers": [answer]} if answer else {}
        question = {"_id": f"q{number}", "text": query, **answers}
        lines["queries.jsonl"].append(msgspec.json.encode(question))
        lines[f"qrels/{_split(query)}.tsv"].append(b"q%d\tp%d\t1" % (number, number))
    for name, content in lines.items():
        (folder / name).write_bytes(b"\n".join(content) + b"\n")


def _split(query: str) -> str:
    """The split by the query's hash, so that a new package version moves no query between them."""
    number = int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big")
    return "dev" if number % DEV_SHARE == 0 else "train"


class Pair(NamedTuple):
    """A docstring's first paragraph and the rest of it, and an answer in that."""

    query: str
    passage: str
    answer: str = ""


def harvest(roots: Sequence[Path], workers: int | None = None) -> list[Pair]:
    """The pairs of all Python files under `roots`, in the order of roots, files and lines.

    A pair is kept if neither its query nor its passage occurred before, ignoring case and white
    space. Files that are not valid Python are skipped.

    Args:
        workers: number of processes; the cores that this process may use when not given.

    Raises:
        DataError: a worker process dies.
    """
    files = [path for root in roots for path in _python_files(root)]
    count = min(workers or usable_cores(), MOST_WORKERS)
    queries: set[str] = set()
    passages: set[str] = set()
    kept: list[Pair] = []
    broken: list[Path] = []
    with (
        _workers(files, count) as processes,
        progress_bar(len(files), "reading docstrings for the demo collection", "files") as bar,
    ):
        for number, path in enumerate(files):
            pairs = _answer(processes[number % count], path)
            if pairs is None:
                broken.append(path)
            for pair in pairs or ():
                new = [_is_new(pair.query, queries), _is_new(pair.passage, passages)]
                if all(new):
                    kept.append(pair)
            bar.update()
    if broken:
        log.info("%d files are not valid Python, such as %s", len(broken), broken[0])
    return kept


def _is_new(text: str, seen: set[str]) -> bool:
    """Whether a text is new; it is added to the texts that were seen."""
    size = len(seen)
    seen.add(" ".join(text.split()).casefold())
    return len(seen) > size


def _python_files(root: Path) -> Iterator[Path]:
    """Python files in an order that does not depend on the file system."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


@contextmanager
def _workers(files: Sequence[Path], count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker i of n reads the files i, i+n, i+2n ...; all have ended when the block ends.

    `multiprocessing` is not used, because its new processes run the user's script again: that
    would open the demo collection, too, and wait forever for the lock that its parent holds.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for start in range(count):
            with TemporaryFile() as names:
                names.write(b"\0".join(map(os.fsencode, files[start::count])))
                names.seek(0)
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-c", WORKER],
                    stdin=names,
                    stdout=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
                )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def _answer(process: subprocess.Popen[bytes], path: Path) -> list[Pair] | None:
    """The pairs of a worker's next file, which is `path`; None when it is not valid Python."""
    line = process.stdout.readline() if process.stdout else b""
    if not line.endswith(b"\n"):
        raise DataError(
            "the demo collection: the process that reads docstrings ended with code "
            f"{process.wait()} at {path} or before; run the command again, or name another "
            "--dataset"
        )
    return msgspec.json.decode(line, type=list[Pair] | None)


def _work() -> None:
    """A worker: file names from stdin, one line of JSON for each file to stdout."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently when the parent has ended
    gc.disable()  # syntax trees have no cycles; looking for them takes a fifth of the time
    for name in sys.stdin.buffer.read().split(b"\0"):
        if name:
            pairs = _pairs_of_file(Path(os.fsdecode(name)))
            sys.stdout.buffer.write(msgspec.json.encode(pairs) + b"\n")


def _pairs_of_file(path: Path) -> list[Pair] | None:
    """The pairs of one file in the order of its lines; None when it is not valid Python."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []  # no string with a paragraph break; parsing takes most of the time
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    pairs = (_pair(docstring) for docstring in _docstrings(tree))
    return [pair for pair in pairs if pair is not None]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, nested ones included."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            yield text.encode(errors="ignore").decode()  # UTF-8 has no half surrogate pairs
        inner = [child for block in BLOCKS for child in getattr(node, block, ())]
        nodes.extend(reversed(inner))


def _pair(docstring: str) -> Pair | None:
    """First paragraph and rest, or None when one of them is too short or far too long."""
    first, *rest = PARAGRAPH_BREAK.split(docstring.strip(), maxsplit=1)
    words = [word for word in first.split() if any(map(str.isalpha, word))]
    query, passage = " ".join(first.split()), "".join(rest).strip()
    if (
        len(words) not in QUERY_WORDS
        or len(query) > QUERY_CHARACTERS
        or len(passage) > PASSAGE_CHARACTERS
        or len(passage.split()) < PASSAGE_WORDS
    ):
        return None
    return Pair(query, passage)
