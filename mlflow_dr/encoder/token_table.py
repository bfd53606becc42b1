"""A tokenised corpus on disk: written once per corpus, tokenizer, length and template, then mapped.

Every checkpoint of a run encodes the same corpus with the same tokenizer, so it is tokenised once.
There are two files: the token ids of all texts end to end, and the offset of each text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mlflow_dr.background import main_module_hidden
from mlflow_dr.cache import cache_entry, sound_entry
from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.files import digest_of, usable_cores
from mlflow_dr.progress import progress_bar

T = TypeVar("T")

KIND = "tokens"
LAYOUT = 1
# a worker takes seconds to start
TEXTS_WORTH_A_PROCESS = 100_000
TEXTS_PER_BATCH = 8192
MOST_OF_A_CORPUS = 0.5


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
        table = _open(directory, self.entry)
        return table if self.rows is None else table.spread(self.rows, self.n_texts)


class TokenTable:
    """Token ids by row, memory-mapped.

    Args:
        ids: token ids of all texts, end to end, `(n_tokens,) uint16 or uint32`.
        starts: the offset of each text in `ids`, `(n_texts,) int64`.
        lengths: number of tokens of each text, `(n_texts,) int64`.
        reference: opens it in another process; None if it is in no file.

    Attributes:
        lengths: number of tokens of each text, `(n_texts,) int64`.
        reference: opens it in another process; None if it is in no file.
    """

    def __init__(
        self,
        ids: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        reference: TableReference | None = None,
    ) -> None:
        self._ids = ids
        self._starts = starts
        self.lengths = lengths
        self.reference = reference

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        """Token ids of one text, `(length,) uint16 or uint32`."""
        start = self._starts[row]
        return self._ids[start : start + self.lengths[row]]

    def spread(self, rows: np.ndarray, n_texts: int) -> TokenTable:
        """A table of more texts; those at `rows` have this table's tokens, others none.

        Args:
            rows: the row of each text in the new table, `(n,) int64`.
            n_texts: rows of the new table.
        """
        starts, lengths = np.zeros(n_texts, np.int64), np.zeros(n_texts, np.int64)
        starts[rows], lengths[rows] = self._starts, self.lengths
        reference = self.reference and self.reference._replace(rows=rows, n_texts=n_texts)
        return TokenTable(self._ids, starts, lengths, reference)

    def part(self, rows: np.ndarray) -> TokenTable:
        """A copy of the tokens of some rows, which can be sent to another process.

        Args:
            rows: those of `padded` have to be among them, `(n,) int64`.
        """
        return _TablePart(self, np.sort(rows))

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts side by side, padded at the right to the longest of them.

        Returns:
            Token ids and mask (1 for a token, 0 for padding), both `(n_rows, longest) int64`.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        columns = np.arange(longest)
        mask = columns < lengths[:, None]
        offsets = np.where(mask, self._starts[rows][:, None] + columns, 0)
        ids = np.where(mask, self._ids[offsets], pad_id).astype(np.int64)
        return ids, mask.astype(np.int64)


class _TablePart(TokenTable):
    """The tokens of some rows of a table, found by their row numbers in that table."""

    def __init__(self, table: TokenTable, rows: np.ndarray) -> None:
        lengths = table.lengths[rows]
        starts = np.cumsum(lengths) - lengths
        places = np.repeat(table._starts[rows] - starts, lengths) + np.arange(lengths.sum())
        super().__init__(table._ids[places], starts, lengths)
        self._rows = rows

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        return super().padded(np.searchsorted(self._rows, rows), pad_id)


def cached_token_table(
    key: str,
    texts: Iterable[Sequence[T]],
    tokenize: Callable[[Sequence[T]], Sequence[Sequence[int]]],
    vocabulary_size: int,
    total: int,
    description: str = "tokenising the corpus",
    processes: int = 1,
) -> TokenTable:
    """The token table of `texts`, from the user's cache or made now and kept there.

    Args:
        key: names the texts, the tokenizer, the maximum length and the template.
        texts: groups of texts or passages; read only when the cache has no such table.
        tokenize: one group -> token ids of each, special tokens and truncation included.
        vocabulary_size: ids are below this; up to 65,536 they take two bytes each.
        total: number of texts, for the progress bar.
        description: the text of the progress bar.
        processes: largest number of worker processes; a small table or one core gets none.
    """
    dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.uint32
    entry = digest_of(LAYOUT, key)
    directory = cache_entry(
        KIND,
        entry,
        lambda partial: _write(
            partial, _tokenised(texts, tokenize, total, processes), dtype, total, description
        ),
    )
    return _open(directory, entry)


def _open(directory: Path, entry: str) -> TokenTable:
    """Map a table of the cache; the size of the file tells whether an id has two or four bytes."""
    offsets = np.load(directory / "offsets.npy")
    path = directory / "ids.bin"
    size = path.stat().st_size
    dtype = np.uint16 if size == 2 * offsets[-1] else np.uint32
    ids = np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
    return TokenTable(
        ids, offsets[:-1], np.diff(offsets), TableReference(entry, None, len(offsets) - 1)
    )


def is_cached(key: str) -> bool:
    """Whether the cache has the token table of this key, undamaged."""
    return sound_entry(KIND, digest_of(LAYOUT, key)) is not None


def token_table(token_ids: Sequence[Sequence[int]]) -> TokenTable:
    """A token table in memory, for a few thousand texts such as the queries of a split."""
    lengths = np.fromiter((len(ids) for ids in token_ids), np.int64, len(token_ids))
    ids = np.fromiter((i for text in token_ids for i in text), np.uint32, int(lengths.sum()))
    return TokenTable(ids, np.cumsum(lengths) - lengths, lengths)


def _tokenised(
    texts: Iterable[Sequence[T]],
    tokenize: Callable[[Sequence[T]], Sequence[Sequence[int]]],
    total: int,
    processes: int,
) -> Iterator[TokenTable]:
    """Each group's token ids, in order; by worker processes for a large corpus."""
    workers = min(processes, usable_cores(), total // TEXTS_WORTH_A_PROCESS)
    if workers < 2 or current_process().daemon:  # daemons cannot start processes
        for group in texts:
            yield token_table(tokenize(group))
        return
    # new processes, because a forked one would share threads and locks of torch and tokenizers
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting: deque[Future[TokenTable]] = deque()
        for group in texts:
            with main_module_hidden():
                waiting.append(pool.submit(_tokenised_group, tokenize, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tokenised_group(
    tokenize: Callable[[Sequence[T]], Sequence[Sequence[int]]], group: Sequence[T]
) -> TokenTable:
    return token_table(tokenize(group))


def _write(
    directory: Path,
    groups: Iterable[TokenTable],
    dtype: type[np.unsignedinteger],
    total: int,
    description: str,
) -> None:
    directory.mkdir()
    lengths: list[np.ndarray] = []
    with (
        (directory / "ids.bin").open("wb") as file,
        progress_bar(total, description, "texts") as bar,
    ):
        for table in groups:
            file.write(table._ids.astype(dtype).tobytes())
            lengths.append(table.lengths)
            bar.update(len(table))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(directory / "offsets.npy", offsets)


def corpus_tokens(corpus: Corpus, text_tokenizer: TextTokenizer, processes: int = 1) -> TokenTable:
    """The passages of a corpus as token ids, made once for each tokenizer and its settings.

    Training and validation share the table if corpus and tokenizer are the same.

    Args:
        corpus: the passages.
        text_tokenizer: makes the token ids.
        processes: the most worker processes that tokenise.
    """
    return cached_token_table(
        _key(corpus, text_tokenizer),
        corpus.batches(),
        text_tokenizer.passage_ids,
        text_tokenizer.vocabulary_size,
        total=len(corpus),
        processes=processes,
    )


def subset_tokens(corpus: Corpus, rows: np.ndarray, text_tokenizer: TextTokenizer) -> TokenTable:
    """A token table with one row for each passage of a corpus; only some rows are filled.

    All rows are filled if the corpus is already tokenised, or if most of it is asked for.

    Args:
        corpus: the passages.
        rows: the rows to fill, ascending, `(n,) int64`.
        text_tokenizer: makes the token ids.
    """
    key = _key(corpus, text_tokenizer)
    if len(rows) > MOST_OF_A_CORPUS * len(corpus) or is_cached(key):
        return corpus_tokens(corpus, text_tokenizer)
    table = cached_token_table(
        f"{key}:{sha256(rows.astype('<i8').tobytes()).hexdigest()}",
        corpus.batches(rows),
        text_tokenizer.passage_ids,
        text_tokenizer.vocabulary_size,
        total=len(rows),
        description="tokenising the subset",
    )
    return table.spread(rows, len(corpus))


def query_tokens(
    examples: Examples, text_tokenizer: TextTokenizer, processes: int = 1
) -> TokenTable:
    """The queries of training examples as token ids, made once for each tokenizer."""
    return cached_token_table(
        f"queries of {examples.digest}:{text_tokenizer.query_digest()}",
        _queries(examples),
        text_tokenizer.query_ids,
        text_tokenizer.vocabulary_size,
        total=len(examples),
        description="tokenising the queries",
        processes=processes,
    )


def _key(corpus: Corpus, text_tokenizer: TextTokenizer) -> str:
    return f"{corpus.digest}:{text_tokenizer.passage_digest()}"


def _queries(examples: Examples) -> Iterator[list[Query]]:
    for start in range(0, len(examples), TEXTS_PER_BATCH):
        stop = min(start + TEXTS_PER_BATCH, len(examples))
        yield [examples[index].query for index in range(start, stop)]
