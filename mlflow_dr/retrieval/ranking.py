"""Rankings: what a search found, by ids; written as TREC run files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import written_beside

Ranking = Mapping[str, Sequence[tuple[str, float]]]
"""query id -> (passage id, score), the best first."""

UNWRITABLE = r"[\pZ\x09-\x0d\x1c-\x1f\x{85}]|^$"
"""What no id in a TREC run file may be: empty, or with white space as `str.split` knows it."""


class Found(NamedTuple):
    """What a search found, by rows of the corpus.

    Attributes:
        rows: passages of each query, the best first, `(n_queries, k) int64`; -1 where a search
            has found fewer.
        scores: `(n_queries, k) float32`; minus infinity where there is no passage.
        also: for each query the scores of the rows that were asked for besides,
            `(n_asked,) float32`; empty when none were.
    """

    rows: np.ndarray
    scores: np.ndarray
    also: Sequence[np.ndarray]


def named_ranking(
    queries: Sequence[Query],
    corpus: Corpus,
    rows: np.ndarray,
    scores: np.ndarray,
    depth: int,
    keep_own_id: bool = False,
) -> dict[str, list[tuple[str, float]]]:
    """A ranking by ids.

    Args:
        queries: the queries, in the order of `rows`.
        corpus: knows the passages' ids.
        rows: corpus rows, the best first, `(n_queries, k) int64`; -1 where there is none.
        scores: `(n_queries, k) float32`.
        depth: passages to keep for each query.
        keep_own_id: keep a passage that has the query's own id. BEIR leaves it out, because in
            some of its collections the queries are passages of the corpus.
    """
    used, places = np.unique(rows, return_inverse=True)
    names = corpus.ids.take(used[used >= 0]).to_pylist()
    if len(names) < len(used):
        names.insert(0, None)
    ids = np.array(names, dtype=object)[places.reshape(rows.shape)]
    ranking = {}
    for query, passage_ids, values in zip(queries, ids, scores.tolist(), strict=True):
        found = zip(passage_ids, values, strict=True)
        kept = [
            (pid, score)
            for pid, score in found
            if pid is not None and (keep_own_id or pid != query.id)
        ]
        ranking[query.id] = kept[:depth]
    return ranking


def write_ranking(path: Path, ranking: Ranking, tag: str = "mlflow_dr") -> None:
    """Write a TREC run file: `query-id Q0 passage-id rank score tag`.

    Raises:
        DataError: see `check_ids`.
    """
    passages = {passage_id for found in ranking.values() for passage_id, _ in found}
    check_ids(pa.array([*ranking, *passages], pa.string()))
    with written_beside(path) as partial, partial.open("w", encoding="utf-8") as file:
        for query_id, found in ranking.items():
            for rank, (passage_id, score) in enumerate(found, start=1):
                file.write(f"{query_id} Q0 {passage_id} {rank} {score:.9g} {tag}\n")


def check_ids(ids: pa.Array | pa.ChunkedArray) -> None:
    """Refuse ids that a TREC run file cannot express, before hours are spent on its ranking.

    Raises:
        DataError: an id is empty or holds white space.
    """
    refused = ids.filter(pc.match_substring_regex(ids, UNWRITABLE))
    if len(refused):
        raise DataError(
            f"id {quoted(refused[0].as_py())}: a TREC run file cannot hold white space in ids, nor "
            f"an empty one ({len(refused):,} of {len(ids):,} are such); ask for no ranking"
        )
