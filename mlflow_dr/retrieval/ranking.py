"""Rankings: what a search found, by ids; written as TREC run files."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import checked_id
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import atomic_write, decoded, read_lines

Ranking = Mapping[str, Sequence[tuple[str, float]]]
"""query id -> (passage id, score), the best first."""

TREC, MSMARCO, TEVATRON = "trec", "msmarco", "tevatron"
BLANK = r"[\pZ\x09-\x0d\x1c-\x1f\x{85}]"  # white space as in `str.split`
UNWRITABLE = {
    TREC: rf"{BLANK}|^$",
    **dict.fromkeys((MSMARCO, TEVATRON), rf"[\t\n\r]|^{BLANK}|{BLANK}$|^$"),
}
"""Ids that a ranking file of each layout cannot hold."""
NAMED_AT_A_TIME = 1 << 17  # passages


class SearchResult(NamedTuple):
    """What a search found, by rows of the corpus.

    Attributes:
        rows: passages of each query, the best first, `(n_queries, k) int64`; -1 where a search
            has found fewer.
        scores: `(n_queries, k) float32`; minus infinity where there is no passage.
        extra_scores: for each query the scores of the extra rows that were requested,
            `(n_asked,) float32`; empty when none were.
    """

    rows: np.ndarray
    scores: np.ndarray
    extra_scores: Sequence[np.ndarray]


class Retriever(Protocol):
    """Searches a corpus for many queries."""

    def search(
        self,
        corpus: Corpus,
        queries: Sequence[Query],
        k: int,
        extra_rows: Sequence[np.ndarray] = (),
    ) -> Iterator[SearchResult]:
        """The best k passages of each query, and the scores of the rows in `extra_rows`.

        Yields what was found for the first queries, the next, and so on, so that not everything
        has to be in memory at once.
        """


class NamedRanking(Mapping[str, list[tuple[str, float]]]):
    """A ranking by ids, of what `without_excluded` has left; see `Ranking`.

    It keeps rows and scores, which take 12 bytes a passage. Their names would take ten times as
    much, so they are looked up for some queries at a time, when they are read.

    Args:
        queries: the queries, in the order of `rows`.
        ids: of the passages, by row.
        rows: rows of passages, the best first, `(n_queries, k) int64`; -1 where there is none.
        scores: `(n_queries, k) float32`.
        depth: passages to keep for each query.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        ids: pa.ChunkedArray,
        rows: np.ndarray,
        scores: np.ndarray,
        depth: int,
    ) -> None:
        self._positions = {query.id: position for position, query in enumerate(queries)}
        self._ids = ids
        self._rows, self._scores = rows[:, :depth], scores[:, :depth]
        self._size = max(1, NAMED_AT_A_TIME // max(1, self._rows.shape[1]))
        self._named: tuple[int, list[list[tuple[str, float]]]] = (-1, [])

    def __getitem__(self, query_id: str) -> list[tuple[str, float]]:
        number, place = divmod(self._positions[query_id], self._size)
        last, named = self._named
        if number != last:
            named = self._name(slice(number * self._size, (number + 1) * self._size))
            self._named = number, named
        return named[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def _name(self, some: slice) -> list[list[tuple[str, float]]]:
        names, scores = _names(self._ids, self._rows[some]), self._scores[some].tolist()
        return [
            [pair for pair in zip(*of_query, strict=True) if pair[0] is not None]
            for of_query in zip(names, scores, strict=True)
        ]


def without_excluded(
    queries: Sequence[Query],
    ids: pa.ChunkedArray,
    rows: np.ndarray,
    scores: np.ndarray,
    keep_own_id: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What was found, without passages that are excluded for their query, as in BRIGHT.

    Args:
        queries: the queries, in the order of `rows`.
        ids: of the passages, by row.
        rows: rows of passages, the best first, `(n_queries, k) int64`; -1 where there is none.
        scores: `(n_queries, k) float32`.
        keep_own_id: keep a passage that has the query's own id. BEIR leaves it out, because in
            some of its collections the queries are passages of the corpus.

    Returns:
        Rows and scores in the same shapes; a row that is left out is -1 at the end.
    """
    if not n_excluded(queries, keep_own_id):
        return rows, scores
    is_excluded = _is_excluded(queries, ids, rows, keep_own_id)
    (touched,) = np.nonzero(is_excluded.any(axis=1))
    if not len(touched):
        return rows, scores
    order = np.argsort(is_excluded[touched], axis=1, kind="stable")
    kept = np.where(is_excluded[touched], -1, rows[touched])
    rows, scores = rows.copy(), scores.copy()
    rows[touched] = np.take_along_axis(kept, order, 1)
    scores[touched] = np.take_along_axis(scores[touched], order, 1)
    return rows, scores


def n_excluded(queries: Sequence[Query], keep_own_id: bool) -> int:
    """How many passages `without_excluded` may take from a query: so many more are searched."""
    return max((len(query.excluded) for query in queries), default=0) + (not keep_own_id)


def _is_excluded(
    queries: Sequence[Query], ids: pa.ChunkedArray, rows: np.ndarray, keep_own_id: bool
) -> np.ndarray:
    """Whether the passage at each row is excluded, in the shape of `rows`."""
    own = [] if keep_own_id else [query.id for query in queries]
    row_of = _rows_by_id(ids, [*own, *(name for query in queries for name in query.excluded)])
    is_excluded = np.zeros(rows.shape, bool)
    if own:
        is_excluded |= rows == np.array([row_of.get(name, -2) for name in own], np.int64)[:, None]
    for index, query in enumerate(queries):
        if query.excluded:
            excluded = [row_of[name] for name in query.excluded if name in row_of]
            is_excluded[index] |= np.isin(rows[index], excluded)
    return is_excluded


def _rows_by_id(ids: pa.ChunkedArray, names: Sequence[str]) -> dict[str, int]:
    """The row of each passage that has one of these ids."""
    if not names:
        return {}
    distinct = pa.array(dict.fromkeys(names), ids.type)
    positions = pc.index_in(ids, value_set=distinct)  # the smaller set is the one that is hashed
    (rows,) = np.nonzero(positions.is_valid().to_numpy())
    found = distinct.take(positions.drop_null().combine_chunks()).to_pylist()
    return dict(zip(found, rows.tolist(), strict=True))


def _names(ids: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """The ids at these rows, None where a row is -1, in the same shape."""
    used, places = np.unique(rows, return_inverse=True)
    names = ids.take(used[used >= 0]).to_pylist()
    if len(names) < len(used):
        names.insert(0, None)
    return np.array(names, dtype=object)[places.reshape(rows.shape)]


def write_ranking(
    path: Path, rankings: Iterable[Ranking], layout: str = TREC, tag: str = "mlflow_dr"
) -> None:
    """Write a ranking to a file.

    Args:
        path: the file.
        rankings: parts of the ranking, each with queries of its own.
        layout: `trec` (query-id Q0 passage-id rank score tag), `msmarco` (query-id passage-id rank)
            or `tevatron` (query-id passage-id score), the last two between tabs.
        tag: names the ranking in TREC's layout.

    Raises:
        DataError: see `check_ranking_ids`.
    """
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for ranking in rankings:
            passages = {passage_id for ranked in ranking.values() for passage_id, _ in ranked}
            check_ranking_ids(pa.array([*ranking, *passages], pa.string()), layout)
            for query_id, ranked in ranking.items():
                for rank, (passage_id, score) in enumerate(ranked, start=1):
                    if layout == TREC:
                        line = f"{query_id} Q0 {passage_id} {rank} {score:.9g} {tag}"
                    elif layout == MSMARCO:
                        line = f"{query_id}\t{passage_id}\t{rank}"
                    else:
                        line = f"{query_id}\t{passage_id}\t{score:.9g}"
                    file.write(f"{line}\n")


def check_ranking_ids(ids: pa.Array | pa.ChunkedArray, layout: str = TREC) -> None:
    """Refuse ids that a ranking file cannot express, before hours are spent on its ranking.

    Raises:
        DataError: an id is empty or holds white space that the layout cannot hold.
    """
    refused = ids.filter(pc.match_substring_regex(ids, UNWRITABLE[layout]))
    if len(refused):
        raise DataError(
            f"id {quoted(refused[0].as_py())}: a ranking file ({layout}) cannot hold "
            f"{'white space' if layout == TREC else 'tabs, or white space at the ends,'} in ids, "
            f"nor an empty one ({len(refused):,} of {len(ids):,} are such); ask for no ranking"
        )


log = logging.getLogger(__name__)

BLANKS = re.compile(r"[ \t\r\x0b\x0c]+")
TREC_COLUMNS, SHORT_COLUMNS = 6, 3
KEPT_MEANWHILE = 4  # times as many as are wanted, before the worst are dropped


def read_ranking(path: Path, k: int, queries: Sequence[Query], corpus: Corpus) -> list[np.ndarray]:
    """The best k passages of each query in a ranking file, as rows of the corpus.

    Passages are ordered by score, whatever the order of the lines; equal scores as trec_eval orders
    them. Three columns are `query-id passage-id rank` (MS MARCO) if the third is a whole number in
    the first line, and `query-id passage-id score` otherwise. Passages that the corpus lacks are
    left out, and queries without a line have no passages; a warning counts both.

    Args:
        path: the file, `.gz` or plain.
        k: passages of each query.
        queries: whose.
        corpus: what the rows are of.

    Returns:
        Rows of each query, the best first, `(<= k,) int64`.

    Raises:
        DataError: no such file, a malformed line, or no line at all that is about these queries
            and passages.
    """
    best = _read(path, k, {query.id for query in queries})
    top_passages = {
        query_id: [passage_id for passage_id, _ in passages] for query_id, passages in best.items()
    }
    ids = sorted(
        {passage_id for passage_ids in top_passages.values() for passage_id in passage_ids}
    )
    rows = dict(zip(ids, corpus.rows_of(ids).tolist(), strict=True))
    unknown = sum(row < 0 for row in rows.values())
    missing = [query.id for query in queries if query.id not in top_passages]
    if not top_passages or unknown == len(ids):
        what = "query" if not top_passages else "passage"
        raise DataError(
            f"{path}: no line names a {what} of the collection; is it a ranking of another one?"
        )
    if unknown or missing:
        example = f" (such as {quoted(missing[0])})" if missing else ""
        log.warning(
            "%s: left out: %d passages that the corpus lacks; %d of %d queries have no line%s",
            *(path, unknown, len(missing), len(queries), example),
        )
    return [
        np.array(
            [
                rows[passage_id]
                for passage_id in top_passages.get(query.id, ())
                if rows[passage_id] >= 0
            ],
            np.int64,
        )
        for query in queries
    ]


def merged_ranking(paths: Sequence[Path], depth: int) -> Ranking:
    """The best passages of each query in several ranking files, such as those of shards.

    Args:
        paths: the files, `.gz` or plain, with scores.
        depth: passages to keep for each query.

    Raises:
        DataError: no such file, a malformed line, or ranks instead of scores.
    """
    merged: dict[str, list[tuple[str, float]]] = {}
    for path in paths:
        for query_id, passages in _read(path, depth, None).items():
            scores = dict(merged.get(query_id, ()))
            for passage_id, score in passages:
                scores[passage_id] = max(score, scores.get(passage_id, -math.inf))
            merged[query_id] = _best(scores, depth)
    return merged


def _read(path: Path, k: int, wanted: set[str] | None) -> dict[str, list[tuple[str, float]]]:
    """The best k passages of each wanted query and their scores, the best first.

    Args:
        path: the file.
        k: passages of each query.
        wanted: the queries; None for all, and for a file that must have scores.
    """
    kept: dict[str, dict[str, float]] = {}
    columns, is_rank = 0, False
    for number, line in read_lines(path):
        fields = _columns(decoded(line, path, number))
        if not columns:
            columns = len(fields)
            is_rank = columns == SHORT_COLUMNS and fields[2].isdecimal()
            if is_rank and wanted is None:
                raise DataError(f"{path}:{number}: ranks without scores cannot be merged")
        if len(fields) != columns or columns not in (TREC_COLUMNS, SHORT_COLUMNS):
            raise DataError(
                f"{path}:{number}: {len(fields)} columns; expected TREC's query-id Q0 passage-id "
                "rank score tag, or query-id passage-id rank (or score), on every line alike"
            )
        query_id, passage_id = fields[0], fields[2 if columns == TREC_COLUMNS else 1]
        score = _score(fields[4 if columns == TREC_COLUMNS else 2], is_rank, path, number)
        if wanted is not None and query_id not in wanted:
            continue
        scores = kept.setdefault(query_id, {})
        if not passage_id or "\0" in passage_id:
            checked_id(passage_id, f"{path}:{number}")
        scores[passage_id] = max(score, scores.get(passage_id, -math.inf))
        if len(scores) > KEPT_MEANWHILE * k:
            kept[query_id] = dict(_best(scores, k))
    if not columns and wanted is not None:  # a shard without passages has an empty file
        raise DataError(f"{path}: the file has no line; expected a ranking")
    best = [max(scores.values()) for scores in kept.values()]
    if is_rank and best and max(best) < -1:
        raise DataError(
            f"{path}: no query has a passage of rank 0 or 1; if the third column has scores, write "
            "them with a decimal point"
        )
    return {query_id: _best(scores, k) for query_id, scores in kept.items()}


def _columns(text: str) -> list[str]:
    """The columns of a line: between tabs where there are as many as needed, else between blanks.

    Only ASCII's blanks part columns, as in trec_eval; between tabs an id may hold blanks.
    """
    if "\t" in text:
        columns = [column.strip() for column in text.split("\t")]
        if len(columns) in (TREC_COLUMNS, SHORT_COLUMNS):
            return columns
    return text.split() if text.isascii() else BLANKS.split(text)


def _best(scores: dict[str, float], k: int) -> list[tuple[str, float]]:
    return nlargest(k, scores.items(), key=lambda item: (item[1], item[0]))


def _score(text: str, is_rank: bool, path: Path, number: int) -> float:
    try:
        if "_" in text or not text.isascii():  # Python reads them as digits, trec_eval does not
            raise ValueError
        score = -float(int(text)) if is_rank else float(text)
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        what = "a rank (a whole number), as on the lines before" if is_rank else "a score"
        raise DataError(f"{path}:{number}: {quoted(text)} is not {what}")
    return score
