"""Token tables of a corpus and of training queries, as an encoder reads them."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.interface import Examples
from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.stores.token_table import TokenTable, cached_token_table

QUERIES_PER_GROUP = 8192


def corpus_tokens(corpus: Corpus, tokenizing: Tokenizing, processes: int = 1) -> TokenTable:
    """The passages of a corpus as token ids: made once per tokenizer and settings, then mapped.

    Training and validation of one corpus with one tokenizer share it.

    Args:
        corpus: the passages.
        tokenizing: how they become token ids.
        processes: worker processes at most that tokenise.
    """
    return cached_token_table(
        f"{corpus.digest}:{tokenizing.passage_digest()}",
        corpus.batches(),
        tokenizing.passage_ids,
        tokenizing.vocabulary_size,
        total=len(corpus),
        processes=processes,
    )


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


def _queries(examples: Examples) -> Iterator[list[Query]]:
    for start in range(0, len(examples), QUERIES_PER_GROUP):
        stop = min(start + QUERIES_PER_GROUP, len(examples))
        yield [examples[index].query for index in range(start, stop)]
