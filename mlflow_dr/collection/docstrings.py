"""Docstrings as pairs of a question and its answer, read from source files by several processes.

The sources are parsed and never imported. This module imports nothing heavy, because every worker
process imports it.
"""

from __future__ import annotations

import ast
import gc
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import msgspec

from mlflow_dr.errors import DataError
from mlflow_dr.progress import progress_bar

log = logging.getLogger(__name__)

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

QUERY_WORDS = range(4, 65)
QUERY_CHARACTERS = 600
PASSAGE_WORDS = 8
PASSAGE_CHARACTERS = 20_000

MOST_WORKERS = 16
WORKER = "from mlflow_dr.collection.docstrings import _work; _work()"

BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class Pair(NamedTuple):
    """A docstring's first paragraph and the rest of it."""

    query: str
    passage: str


def harvest(roots: Sequence[Path], workers: int | None = None) -> list[Pair]:
    """The pairs of all Python files under `roots`, in the order of roots, files and lines.

    A pair is kept if neither its query nor its passage occurred before, ignoring case and white
    space. Files that are not valid Python are skipped.

    Args:
        workers: number of processes; the cores that this process may use when not given.

    Raises:
        DataError: a worker process dies.
    """
    from mlflow_dr.files import usable_cores  # workers do not need it

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
            pairs = processes[number % count].answer(path)
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
def _workers(files: Sequence[Path], count: int) -> Iterator[list[_Worker]]:
    """Worker i of n reads the files i, i+n, i+2n ...; all have ended when the block ends."""
    workers: list[_Worker] = []
    try:
        for start in range(count):
            workers.append(_Worker(files[start::count]))
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that parses files, and a thread that collects its answers.

    `multiprocessing` is not used, because its new processes run the user's script again: that
    would open the demo collection, too, and wait forever for the lock that its parent holds.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )
        self._lines: SimpleQueue[bytes] = SimpleQueue()
        self._thread = Thread(target=self._talk, args=(files,), daemon=True)
        self._thread.start()

    def _talk(self, files: Sequence[Path]) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is not None and stdout is not None:  # both are pipes, as asked for above
            with suppress(BrokenPipeError), stdin:
                stdin.write(b"\0".join(map(os.fsencode, files)))
            with stdout:
                for line in stdout:
                    self._lines.put(line)
        self._lines.put(b"")

    def answer(self, path: Path) -> list[Pair] | None:
        """The pairs of the next file, which is `path`; None when it is not valid Python."""
        line = self._lines.get()
        if not line.endswith(b"\n"):
            raise DataError(
                "the demo collection: the process that reads docstrings ended with code "
                f"{self._process.wait()} at {path} or before; run the command again, or name "
                "another --dataset"
            )
        pairs = msgspec.json.decode(line)
        return None if pairs is None else [Pair(*pair) for pair in pairs]

    def end(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()
        self._process.wait()
        self._thread.join()


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
