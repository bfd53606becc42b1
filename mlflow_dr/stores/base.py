"""What a document store is, and the registry of all of them."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from mlflow_dr.cache import about_entry, cache_entry
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.errors import DataError, UsageError, one_line, quoted
from mlflow_dr.extensions import Registry
from mlflow_dr.stores.ids import rows_in_file, write_ids

KIND = "stores"
LAYOUT = 1
DESCRIPTION = "store.json"
IDS = "ids.arrow"
TEXT, TOKENS, NOTHING = "text", "tokens", "nothing"


class DocumentStore(ABC):
    """The passages of a corpus in files, read by row; rows are those of the corpus.

    A store is cheap to make: files are opened when they are first read, and again in a process that
    was forked since. Sent to another process, a store is the path of its directory. Several threads
    may read at the same time.

    A subclass says how files are written, opened and read.

    Args:
        directory: the folder that `build` wrote.

    Attributes:
        directory: the same.
    """

    holds: ClassVar[str] = TEXT
    """What `get_many` gives: `text` (passages), `tokens` (arrays of token ids) or `nothing` (empty
    passages)."""
    holds_tokenised: ClassVar[bool] = False
    """Whether it can hold a corpus that has token ids and no text."""
    files_of: ClassVar[str] = ""
    """The store whose files are read, where it is another one."""
    works_in_forks: ClassVar[bool] = True
    """Whether forked processes can read it."""
    open_after_fork: ClassVar[bool] = False
    """Whether a forked process may read what was opened before."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._opened: Any = None
        self._process = 0
        self._description: dict[str, Any] = {}

    @classmethod
    def build(cls, corpus: Corpus, directory: Path) -> None:
        """Write the files of a corpus into an empty directory."""
        write_ids(corpus, directory / IDS)
        cls.write_files(corpus, directory)
        description = {"passages": len(corpus), "files": _sizes(directory)}
        (directory / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")

    @classmethod
    @abstractmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the files that `open_files` opens."""

    @classmethod
    def directory_of(cls, name: str, corpus: Corpus) -> Path:
        """The directory of the store of a corpus, made in the user's cache if it is not there.

        Args:
            name: the name of the store.
            corpus: the corpus.

        Raises:
            UsageError: it cannot hold this corpus.
        """
        if corpus.tokenised and not cls.holds_tokenised:
            raise UsageError(
                f"document store {name!r}: it holds text, but this corpus has only token ids; use "
                "the store 'corpus'"
            )

        def build(partial: Path) -> None:
            partial.mkdir()
            cls.build(corpus, partial)

        files_of = cls.files_of or name.partition(":")[0]
        return cache_entry(
            KIND,
            f"{LAYOUT}:{files_of}:{corpus.digest}",
            build,
            f"{files_of} of {about_entry(corpus.directory)}",
        )

    @abstractmethod
    def open_files(self) -> Any:
        """Open the files; what `read` gets. Its `close()`, if it has one, is called at the end."""

    @abstractmethod
    def read(self, opened: Any, rows: np.ndarray) -> list[Any]:
        """Read some rows, in this order and with repeats.

        Args:
            opened: what `open_files` returned in this process.
            rows: at least one row, each in range, `(n,) int64`.
        """

    def __len__(self) -> int:
        return int(self._described()["passages"])

    def get_many(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """The passages at some rows, in the order of the rows and with repeats.

        Returns:
            A `Passage` for each row; with a store that holds tokens, its ids, `(length,) uint16 or
            uint32`.

        Raises:
            IndexError: the corpus has no such row.
            DataError: the files are missing or damaged.
        """
        wanted = np.asarray(rows)
        if not wanted.size:
            return []
        if wanted.dtype.kind not in "iu":
            raise TypeError(f"rows are integers, not {wanted.dtype}")
        if wanted.min() < 0 or wanted.max() >= len(self):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise IndexError(f"row {outside} of a document store of {len(self)} passages")
        return self.read(self.opened(), wanted)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of passages, `(len(ids),) int64`; reads all ids, so call it before training.

        Raises:
            DataError: the corpus has no passage of an id.
        """
        self._described()
        rows = self.find(ids)
        if (rows < 0).any():
            unknown = ids[int(np.argmax(rows < 0))]
            raise DataError(f"{self.directory}: no passage has the id {quoted(unknown)}")
        return rows

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of passages, `(len(ids),) int64`; -1 for an id that the corpus does not have."""
        return rows_in_file(ids, self.directory / IDS)

    def files(self) -> list[Path]:
        """The files of the store, for their size, their pages in memory, or a copy."""
        paths = (path for path in self.directory.rglob("*") if not path.name.startswith("."))
        return sorted(path for path in paths if path.is_file())

    def close(self) -> None:
        """Close the files; reading opens them again."""
        opened, self._opened = self._opened, None
        if hasattr(opened, "close"):
            opened.close()

    def __enter__(self) -> DocumentStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., DocumentStore], tuple[Path]]:
        return type(self), (self.directory,)

    def opened(self) -> Any:
        """What `open_files` returns in this process; the files are opened now, if they are not.

        Raises:
            DataError: the files are missing or damaged.
        """
        process = os.getpid()
        if self._opened is not None and process != self._process and not self.open_after_fork:
            self.close()  # what was opened before a fork shares its position with the parent
        if self._opened is None:
            self._described()
            with self._readable():
                self._opened = self.open_files()
            self._process = process
        return self._opened

    def _described(self) -> dict[str, Any]:
        """What `build` wrote down at its end, after a check that the files have their sizes."""
        if not self._description:
            with self._readable():
                self._description = self.describe()
        return self._description

    def describe(self) -> dict[str, Any]:
        """Check the files; gives at least the number of `passages`.

        Raises:
            DataError: a file is missing or has another size than it was written with.
        """
        text = (self.directory / DESCRIPTION).read_text(encoding="utf-8")
        description: dict[str, Any] = json.loads(text)
        sizes = _sizes(self.directory)
        for name, size in description["files"].items():
            if sizes.get(name) != size:
                raise self.damage(f"{name} has {sizes.get(name, 0)} bytes instead of {size}")
        return description

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of files in the block become ours."""
        try:
            yield
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise self.damage(one_line(error)) from error

    def damage(self, what: str) -> DataError:
        """The error of files that cannot be read."""
        return DataError(
            f"{self.directory}: not the undamaged files of a document store ({what}); remove the "
            "directory, and it is made again"
        )


def _sizes(directory: Path) -> dict[str, int]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != DESCRIPTION)
    return {str(path.relative_to(directory)): path.stat().st_size for path in sorted(paths)}


STORES: Registry[type[DocumentStore]] = Registry("document store", "mlflow_dr.document_stores")
