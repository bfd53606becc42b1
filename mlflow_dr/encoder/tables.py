"""Token tables of a corpus and of training queries, as an encoder reads them."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Examples
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.stores.token_table import TokenTable, cached_token_table, is_cached

QUERIES_PER_GROUP = PASSAGES_PER_GROUP = 8192
MOST_OF_IT = 0.5


def corpus_tokens(corpus: Corpus, tokenizing: Tokenizing, processes: int = 1) -> TokenTable:
    """The passages of a corpus as token ids: made once per tokenizer and settings, then mapped.

    Training and validation of one corpus with one tokenizer share it.

    Args:
        corpus: the passages.
        tokenizing: how they become token ids.
        processes: worker processes at most that tokenise.
    """
    return cached_token_table(
        _key(corpus, tokenizing),
        corpus.batches(),
        tokenizing.passage_ids,
        tokenizing.vocabulary_size,
        total=len(corpus),
        processes=processes,
    )


def subset_tokens(corpus: Corpus, rows: np.ndarray, tokenizing: Tokenizing) -> TokenTable:
    """Some passages of a corpus as token ids: a table of the whole corpus with only these.

    Where the whole corpus has been tokenised already, or these are most of it, that is taken.

    Args:
        corpus: the passages.
        rows: which, ascending, `(n,) int64`.
        tokenizing: how they become token ids.
    """
    key = _key(corpus, tokenizing)
    if len(rows) > MOST_OF_IT * len(corpus) or is_cached(key):
        return corpus_tokens(corpus, tokenizing)
    table = cached_token_table(
        f"{key}:{sha256(rows.astype('<i8').tobytes()).hexdigest()}",
        _passages(corpus, rows),
        tokenizing.passage_ids,
        tokenizing.vocabulary_size,
        total=len(rows),
        description="tokenising the subset",
    )
    return table.spread(rows, len(corpus))


def query_tokens(examples: Examples, tokenizing: Tokenizing, processes: int = 1) -> TokenTable:
    """The queries of training examples as token ids, likewise."""
    return cached_token_table(
        f"queries of {examples.digest}:{tokenizing.query_digest()}",
        _queries(examples),
        tokenizing.query_ids,
        tokenizing.vocabulary_size,
        total=len(examples),
        description="tokenising the queries",
        processes=processes,
    )


def _key(corpus: Corpus, tokenizing: Tokenizing) -> str:
    return f"{corpus.digest}:{tokenizing.passage_digest()}"


def _passages(corpus: Corpus, rows: np.ndarray) -> Iterator[list[Passage]]:
    for start in range(0, len(rows), PASSAGES_PER_GROUP):
        yield corpus.passages(rows[start : start + PASSAGES_PER_GROUP])


def _queries(examples: Examples) -> Iterator[list[Query]]:
    for start in range(0, len(examples), QUERIES_PER_GROUP):
        stop = min(start + QUERIES_PER_GROUP, len(examples))
        yield [examples[index].query for index in range(start, stop)]
