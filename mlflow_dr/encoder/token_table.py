"""Token tables in the cache: made once per corpus, tokenizer, length and template, then mapped.

Every checkpoint of a run encodes the same corpus with the same tokenizer, so it is tokenised once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import current_process, get_context
from typing import Any, TypeVar

import numpy as np

from mlflow_dr.background import main_module_hidden
from mlflow_dr.cache import about_entry, cache_entry, remove_entry, sound_entry
from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.files import digest_of, usable_cores
from mlflow_dr.stores.token_table import KIND, TokenTable, map_table, token_table, write_table

T = TypeVar("T")

LAYOUT = 1
# a worker takes seconds to start
TEXTS_WORTH_A_PROCESS = 50_000
TEXTS_PER_BATCH = 8192
PASSAGES_PER_PART = 1 << 19
MOST_OF_A_CORPUS = 0.5


def cached_token_table(
    key: str,
    texts: Iterable[Sequence[T]],
    tokenize: Callable[[Sequence[T]], Sequence[Sequence[int]]],
    vocabulary_size: int,
    total: int,
    description: str = "tokenising the corpus",
    processes: int = 1,
    about: str = "",
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
        about: what the texts are, for `mlflow-dr cache`.
    """
    tables = _tokenised(texts, tokenize, total, processes)
    return _cached(key, tables, vocabulary_size, total, description, about)


def _cached(
    key: str,
    tables: Iterable[TokenTable],
    vocabulary_size: int,
    total: int,
    description: str,
    about: str,
) -> TokenTable:
    """The token table of a key, from the cache or joined now; see `cached_token_table`."""
    dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.uint32
    entry = digest_of(LAYOUT, key)
    directory = cache_entry(
        KIND,
        entry,
        lambda partial: write_table(partial, tables, dtype, total, description),
        about,
    )
    return map_table(directory, entry)


def is_cached(key: str) -> bool:
    """Whether the cache has the token table of this key, undamaged."""
    return sound_entry(KIND, digest_of(LAYOUT, key)) is not None


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
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_tokenizer, (tokenize,)) as pool:
        waiting: deque[Future[TokenTable]] = deque()
        for group in texts:
            with main_module_hidden():
                waiting.append(pool.submit(_tokenised_group, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_of_worker: list[Callable[[Sequence[Any]], Sequence[Sequence[int]]]] = []
"""What a worker process tokenises by; sent once, so that it can keep the words that it has seen."""


def _set_tokenizer(tokenize: Callable[[Sequence[Any]], Sequence[Sequence[int]]]) -> None:
    _of_worker[:] = [tokenize]


def _tokenised_group(group: Sequence[Any]) -> TokenTable:
    return token_table(_of_worker[0](group))


def corpus_tokens(
    corpus: Corpus, text_tokenizer: TextTokenizer, processes: int | None = None
) -> TokenTable:
    """The passages of a corpus as token ids, made once for each tokenizer and its settings.

    Training and validation share the table if corpus and tokenizer are the same. A large corpus is
    tokenised part by part, so that the parts that are done outlive a process that is killed, and
    several processes make different parts.

    Args:
        corpus: the passages.
        text_tokenizer: makes the token ids.
        processes: the most worker processes that tokenise; as many as there are cores when None.
    """
    key = _key(corpus, text_tokenizer)
    starts = range(0, len(corpus), PASSAGES_PER_PART)
    if len(starts) < 2 or is_cached(key):
        return _passage_tokens(key, corpus, None, text_tokenizer, processes)

    def part(start: int) -> TokenTable:
        rows = np.arange(start, min(start + PASSAGES_PER_PART, len(corpus)))
        return _passage_tokens(f"{key}:{start}", corpus, rows, text_tokenizer, processes)

    # in an order of its own, so that processes seldom wait for one another
    for start in random.Random().sample(starts, len(starts)):
        if not is_cached(key):  # another process may have joined them meanwhile
            part(start)
    table = _cached(
        key,
        map(part, starts),
        text_tokenizer.vocabulary_size,
        len(corpus),
        "joining the tokens",
        _about(corpus, len(corpus)),
    )
    for start in starts:
        remove_entry(KIND, digest_of(LAYOUT, f"{key}:{start}"))
    return table


def _passage_tokens(
    key: str,
    corpus: Corpus,
    rows: np.ndarray | None,
    text_tokenizer: TextTokenizer,
    processes: int | None,
) -> TokenTable:
    """The tokens of some passages, or of all, tokenised in one go."""
    total = len(corpus) if rows is None else len(rows)
    is_all = total == len(corpus)
    return cached_token_table(
        key,
        corpus.batches(rows),
        text_tokenizer.passage_ids,
        text_tokenizer.vocabulary_size,
        total,
        "tokenising the corpus" if is_all else f"tokenising {total:,} of {len(corpus):,} passages",
        processes or usable_cores(),
        _about(corpus, total),
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
    digest = sha256(rows.astype("<i8").tobytes()).hexdigest()
    table = _passage_tokens(f"{key}:{digest}", corpus, rows, text_tokenizer, processes=1)
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
        about=f"{len(examples):,} queries of training examples",
    )


def _about(corpus: Corpus, count: int) -> str:
    source = about_entry(corpus.directory)
    return f"{count:,} passages{' of ' if source else ''}{source}"


def _key(corpus: Corpus, text_tokenizer: TextTokenizer) -> str:
    return f"{corpus.digest}:{text_tokenizer.passage_digest()}"


def _queries(examples: Examples) -> Iterator[list[Query]]:
    for start in range(0, len(examples), TEXTS_PER_BATCH):
        stop = min(start + TEXTS_PER_BATCH, len(examples))
        yield [examples[index].query for index in range(start, stop)]
