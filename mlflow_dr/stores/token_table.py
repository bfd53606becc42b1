"""A tokenised corpus on disk, mapped into memory.

There are two files: the token ids of all texts end to end, and the offset of each text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr.cache import sound_entry
from mlflow_dr.errors import DataError, one_line
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.progress import progress_bar

KIND = "tokens"
IDS, OFFSETS = "ids.bin", "offsets.npy"


class TableReference(NamedTuple):
    """How another process that has the same cache opens a token table.

    Attributes:
        entry: the key of the cache entry.
        rows: see `TokenTable.spread`; None if every row of the table is in the entry.
        n_texts: rows of the table.
    """

    entry: str
    rows: np.ndarray | None
    n_texts: int

    def open(self) -> TokenTable | None:
        """The table, or None if this machine's cache does not have it, undamaged."""
        directory = sound_entry(KIND, self.entry)
        if directory is None:
            return None
        table = map_table(directory, self.entry)
        return table if self.rows is None else table.spread(self.rows, self.n_texts)


class TokenTable:
    """Token ids by row, memory-mapped.

    A table that is in files is sent to another process as their path, and mapped there.

    Args:
        ids: token ids of all texts, end to end, `(n_tokens,) uint16 or uint32`.
        starts: the offset of each text in `ids`, `(n_texts,) int64`.
        ends: the offset of the end of each text, `(n_texts,) int64`.
        reference: opens it where the cache has it; None if it is in no file.
        directory: the folder of its files; None if it is in no file.

    Attributes:
        reference: opens it where the cache has it; None if it is in no file.
        directory: the folder of its files; None if it is in no file.
    """

    def __init__(
        self,
        ids: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        reference: TableReference | None = None,
        directory: Path | None = None,
    ) -> None:
        self._ids = ids
        self._starts = starts
        self._ends = ends
        self.reference = reference
        self.directory = directory

    def __len__(self) -> int:
        return len(self._starts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if self.reference is None or self.directory is None:
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return _mapped_again, (self.directory, self.reference)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, `(n_texts,) int64`."""
        return self._ends - self._starts

    def __getitem__(self, row: int) -> np.ndarray:
        """Token ids of one text, `(length,) uint16 or uint32`."""
        return self._ids[self._starts[row] : self._ends[row]]

    def get_many(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of some texts in the order of the rows, each `(length,) uint16 or uint32`."""
        chosen = np.asarray(rows, np.int64)
        ends, ids = self._ends[chosen].tolist(), self._ids
        return [
            ids[start:end] for start, end in zip(self._starts[chosen].tolist(), ends, strict=True)
        ]

    def spread(self, rows: np.ndarray, n_texts: int) -> TokenTable:
        """A table of more texts; those at `rows` have this table's tokens, others none.

        Args:
            rows: the row of each text in the new table, `(n,) int64`.
            n_texts: rows of the new table.
        """
        starts, ends = np.zeros(n_texts, np.int64), np.zeros(n_texts, np.int64)
        starts[rows], ends[rows] = self._starts, self._ends
        reference = self.reference and self.reference._replace(rows=rows, n_texts=n_texts)
        return TokenTable(self._ids, starts, ends, reference, self.directory)

    def part(self, rows: np.ndarray) -> TokenTable:
        """A copy of the tokens of some rows, which can be sent to another process.

        Args:
            rows: those of `packed` have to be among them, `(n,) int64`.
        """
        return _TablePart(self, np.sort(rows))

    def packed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Texts end to end.

        Returns:
            Token ids `(n_tokens,) int64`, and the tokens of each text `(n_rows,) int64`.
        """
        starts = self._starts[rows]
        lengths = self._ends[rows] - starts
        offsets = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        return self._ids[offsets + np.arange(len(offsets))].astype(np.int64), lengths


class _TablePart(TokenTable):
    """The tokens of some rows of a table, found by their row numbers in that table."""

    def __init__(self, table: TokenTable, rows: np.ndarray) -> None:
        lengths = table._ends[rows] - table._starts[rows]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        places = np.repeat(table._starts[rows] - starts, lengths) + np.arange(lengths.sum())
        super().__init__(table._ids[places], starts, ends)
        self._rows = rows

    def packed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().packed(np.searchsorted(self._rows, rows))


def token_table(token_ids: Sequence[Sequence[int]]) -> TokenTable:
    """A token table in memory, for a few thousand texts such as the queries of a split."""
    lengths = np.fromiter((len(ids) for ids in token_ids), np.int64, len(token_ids))
    ids = np.fromiter(chain.from_iterable(token_ids), np.uint32, int(lengths.sum()))
    ends = np.cumsum(lengths)
    return TokenTable(ids, ends - lengths, ends)


def map_table(directory: Path, entry: str = "", at_random: bool = False) -> TokenTable:
    """Map the table that `write_table` wrote.

    Args:
        directory: the folder.
        entry: the key of the cache entry that it is; empty if it is none.
        at_random: whether few of the texts are read, see `MappedFile`.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        ids, offsets = _mapped_arrays(directory, at_random)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory}: not the undamaged files of a token table ({one_line(error)}); remove "
            "the directory, and it is made again"
        ) from error
    reference = TableReference(entry, None, len(offsets) - 1) if entry else None
    return TokenTable(ids, offsets[:-1], offsets[1:], reference, directory)


def _mapped_arrays(directory: Path, at_random: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and offsets as plain arrays, because slices of `np.memmap` are slow."""
    with (directory / OFFSETS).open("rb") as file:
        np.lib.format.read_magic(file)
        (count,), _, _ = np.lib.format.read_array_header_1_0(file)
        offsets = np.frombuffer(
            MappedFile(directory / OFFSETS, at_random).data, "<i8", count, file.tell()
        )
    data, total = MappedFile(directory / IDS, at_random).data, int(offsets[-1])
    if len(data) not in (2 * total, 4 * total):
        raise ValueError(f"{IDS} has {len(data)} bytes for {total} tokens")
    # the size tells whether an id has two or four bytes
    return np.frombuffer(data, np.uint16 if len(data) == 2 * total else np.uint32), offsets


def _mapped_again(directory: Path, reference: TableReference) -> TokenTable:
    table = map_table(directory, reference.entry)
    return table if reference.rows is None else table.spread(reference.rows, reference.n_texts)


def write_table(
    directory: Path,
    groups: Iterable[TokenTable],
    dtype: type[np.unsignedinteger],
    total: int,
    description: str,
) -> None:
    """Write groups of texts one after the other.

    Args:
        directory: the folder, which does not exist yet.
        groups: the texts.
        dtype: of an id in the file.
        total: number of texts, for the progress bar.
        description: the text of the progress bar.
    """
    directory.mkdir()
    lengths: list[np.ndarray] = []
    with (
        (directory / IDS).open("wb") as file,
        progress_bar(total, description, "texts") as bar,
    ):
        for table in groups:
            file.write(table._ids.astype(dtype).tobytes())
            lengths.append(table.lengths)
            bar.update(len(table))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(directory / OFFSETS, offsets)
