"""Tops of a corpus by BM25 or an encoder, searched once and kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.errors import UsageError
from mlflow_dr.files import digest_of, file_sha256
from mlflow_dr.retrieval.bm25 import Bm25Retriever, warn_of_no_matches
from mlflow_dr.retrieval.dense import DenseRetriever
from mlflow_dr.retrieval.ranking import Retriever
from mlflow_dr.subsets.spec import BM25, SubsetTerm
from mlflow_dr.tracking.encoders import encoder_errors, encoder_location, resolve_encoder

if TYPE_CHECKING:
    from mlflow_dr.tracking.checkpoints import Checkpoint

LAYOUT = 1
ROWS = "rows.npy"
# weights, settings, and vocabularies of all kinds
FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.py")


class CachedSearching:
    """Searches a corpus for the tops that subsets are made of.

    Args:
        corpus: what is searched.
        device: where encoders run.
        dtype: in which number format.
        published: gives the checkpoint of a training step of the run, where there is one.
        tracking_uri: where `models:/` is looked up; the environment's server when None.
    """

    def __init__(
        self,
        corpus: Corpus,
        device: str = "auto",
        dtype: str = "auto",
        published: Callable[[int], Checkpoint] | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        self._corpus = corpus
        self._device = device
        self._dtype = dtype
        self._published = published
        self._tracking_uri = tracking_uri

    def top_passages(self, part: SubsetTerm, queries: Sequence[Query]) -> list[np.ndarray]:
        """The best passages of each query: rows of the corpus, the best first, `(<= k,) int64`.

        Raises:
            UsageError: no such encoder, or no such checkpoint.
            DataError: the corpus is token ids, which BM25 cannot search.
            CheckpointError: the encoder's files are damaged.
            TrackingError: no such model, or no server.
        """
        if part.kind == BM25:
            found = self._cached(("bm25",), Bm25Retriever, part.count, queries)
            without = sum(len(rows) == 0 for rows in found)
            warn_of_no_matches(
                without, len(queries), f"subset {part} has only judged passages for these"
            )
            return found
        source = self._source(part)
        if not isinstance(source, str) and source.manifest:
            # what is kept needs no files, which may be gone by now
            identity = (source.manifest, self._dtype)
            return self._cached(identity, lambda: self._searcher(source), part.count, queries)
        with encoder_location(source) as name:
            directory = encoder_directory(name)
            identity = (digest_of(*_files(directory)), self._dtype)
            return self._cached(
                identity, lambda: self._searcher(str(directory)), part.count, queries
            )

    def _searcher(self, source: Checkpoint | str) -> Retriever:
        name = source if isinstance(source, str) else source.uri
        with encoder_location(source) as directory, encoder_errors(name):
            encoder = load_encoder(directory)
        return DenseRetriever(encoder, self._device, self._dtype)

    def _source(self, part: SubsetTerm) -> Checkpoint | str:
        (name,) = part.names
        if part.step is None:
            return resolve_encoder(name, self._tracking_uri)
        if self._published is None:
            raise UsageError(f"subset {part}: there is no run here whose checkpoint that could be")
        return self._published(part.step)

    def _cached(
        self,
        identity: Sequence[str],
        searcher: Callable[[], Retriever],
        k: int,
        queries: Sequence[Query],
    ) -> list[np.ndarray]:
        asked = [repr((one.id, one.text, list(one.tokens or ()))) for one in queries]
        key = digest_of(LAYOUT, self._corpus.digest, *identity, k, *asked)

        def write(partial: Path) -> None:
            found = [one.rows for one in searcher().search(self._corpus, queries, k)]
            partial.mkdir()
            np.save(partial / ROWS, np.concatenate(found))

        rows = np.load(cache_entry("tops", key, write) / ROWS)
        return [one[one >= 0] for one in rows]


def _files(directory: Path) -> list[str]:
    """What an encoder's figures depend on."""
    files = sorted({path for pattern in FILES for path in directory.rglob(pattern)})
    return [f"{path.relative_to(directory)} {file_sha256(path)}" for path in files]
