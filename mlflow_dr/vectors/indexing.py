"""Indexes vectors of passages, and stores the index with the run of the checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.faiss_index import CUT_OFFS, build_index
from mlflow_dr.retrieval.vectors import Vectors, open_vectors
from mlflow_dr.tracking.encoders import MODEL_SCHEME, checkpoint_and_run
from mlflow_dr.vectors.config import IndexConfig

log = logging.getLogger(__name__)


def index(config: IndexConfig) -> dict[str, Any]:
    """Build an index of the vectors of a folder, and compare it with exact search.

    Args:
        config: the vectors, the kind of index and the folder to write.

    Returns:
        The manifest of the index.

    Raises:
        UsageError: no vectors, queries of another encoder, a factory string that FAISS refuses, or
            an output that exists.
        DataError: a file is damaged, or an id that pyserini cannot read.
        TrackingError: the index was built, but the server did not take it.
    """
    vectors = open_vectors(config.vectors)
    if vectors.manifest is not None and vectors.manifest.kind == "queries":
        raise UsageError(f"{config.vectors} has vectors of queries; name those of passages")
    published = None
    if config.log:
        name = vectors.manifest.encoder if vectors.manifest else ""
        if not name.startswith(MODEL_SCHEME):
            raise UsageError(
                f"--log needs vectors of a published checkpoint; {config.vectors} was encoded by "
                f"{name or 'another program'}"
            )
        published = checkpoint_and_run(name, config.tracking_uri)
    queries = _queries(config, vectors)
    manifest = build_index(
        vectors, config.output, config.factory, queries, config.recall, config.seed
    )
    lowest = min(manifest[f"recall_at_{k}"] or 0.0 for k in CUT_OFFS)
    if manifest["queries"] and lowest < config.recall:
        log.warning(
            "recall is %.4f, below --recall %g, and more effort does not help; another --factory "
            "finds more, or one that scores the best again (Refine)",
            *(lowest, config.recall),
        )
    if published is not None:
        from mlflow_dr.tracking.artifacts import log_index

        checkpoint, run = published
        log_index(run, checkpoint, config.output)
    return manifest


def _queries(config: IndexConfig, passages: Vectors) -> np.ndarray | None:
    if config.queries is None:
        return None
    queries = open_vectors(config.queries)
    digest = queries.manifest.encoder_digest if queries.manifest else None
    shape = (len(queries), queries.dimension)
    passages.check_queries(config.queries, config.vectors, shape, digest)
    return queries.read()
