"""Stores over files that the cache has anyway: a corpus, and a token table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_dr.collection.corpus import Corpus, CorpusWriter, open_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import UsageError
from mlflow_dr.stores.base import DESCRIPTION, STORES, TOKENS, DocumentStore
from mlflow_dr.stores.token_table import TokenTable, map_table


@STORES.register("corpus")
class CorpusStore(DocumentStore):
    """The Arrow file of a corpus, mapped."""

    holds_tokenised = True

    @classmethod
    def directory_of(cls, name: str, corpus: Corpus) -> Path:
        """The directory that the corpus is mapped from; written now if it is in memory."""
        return corpus.directory or super().directory_of(name, corpus)

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Write the corpus."""
        with CorpusWriter(directory, len(corpus)) as writer:
            for passages in corpus.batches():
                for passage in passages:
                    writer.add(passage)

    def open_files(self) -> Corpus:
        """Map the file."""
        return open_corpus(self.directory)

    def read(self, opened: Corpus, rows: np.ndarray) -> list[Passage]:
        """Slices of the mapped file."""
        return opened.passages(rows)

    def describe(self) -> dict[str, Any]:
        """The file itself says whether it is complete, and how many passages it has."""
        if (self.directory / DESCRIPTION).exists():
            return super().describe()
        return {"passages": len(open_corpus(self.directory))}

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """See `DocumentStore.find`."""
        corpus: Corpus = self.opened()
        return corpus.rows_of(ids)


@STORES.register("tokens")
class TokenStore(DocumentStore):
    """A token table, mapped; what `corpus_tokens` makes of a corpus and a tokenizer."""

    holds = TOKENS

    @classmethod
    def directory_of(cls, name: str, corpus: Corpus) -> Path:
        """Refused: a corpus has a table for each tokenizer."""
        raise UsageError(
            "the document store 'tokens' needs a tokenizer, too: its directory is that of the "
            "token table which `corpus_tokens` makes"
        )

    @classmethod
    def write_files(cls, corpus: Corpus, directory: Path) -> None:
        """Refused, see `directory_of`."""
        cls.directory_of("tokens", corpus)

    def open_files(self) -> TokenTable:
        """Map the table."""
        return map_table(self.directory, at_random=True)

    def read(self, opened: TokenTable, rows: np.ndarray) -> list[np.ndarray]:
        """Slices of the mapped array."""
        return opened.get_many(rows)

    def describe(self) -> dict[str, Any]:
        """The offsets of the table say how many texts it has."""
        return {"passages": len(map_table(self.directory, at_random=True))}

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Refused: a token table has no ids."""
        raise UsageError(
            "the document store 'tokens' has no passage ids; ask the corpus for rows by `rows_of`"
        )
