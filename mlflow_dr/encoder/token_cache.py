"""Token tables of corpora and training queries, which are made once and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Examples
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.stores.token_table import TokenTable, cached_token_table, is_cached

TEXTS_PER_BATCH = 8192
MOST_OF_A_CORPUS = 0.5


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
        _passages(corpus, rows),
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


def _passages(corpus: Corpus, rows: np.ndarray) -> Iterator[list[Passage]]:
    for start in range(0, len(rows), TEXTS_PER_BATCH):
        yield corpus.passages(rows[start : start + TEXTS_PER_BATCH])


def _queries(examples: Examples) -> Iterator[list[Query]]:
    for start in range(0, len(examples), TEXTS_PER_BATCH):
        stop = min(start + TEXTS_PER_BATCH, len(examples))
        yield [examples[index].query for index in range(start, stop)]
