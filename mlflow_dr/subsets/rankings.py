"""Rankings in files: TREC's run files, MS MARCO's, and lines of query, passage and score."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import check_id
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import decoded, read_lines

log = logging.getLogger(__name__)

BLANKS = re.compile(r"[ \t\r\x0b\x0c]+")
TREC_COLUMNS, SHORT_COLUMNS = 6, 3
KEPT_MEANWHILE = 4  # times as many as are wanted, before the worst are dropped


def ranking_tops(path: Path, k: int, queries: Sequence[Query], corpus: Corpus) -> list[np.ndarray]:
    """The best k passages of each query in a ranking file, as rows of the corpus.

    By score, in whatever order the lines are; equal scores as trec_eval orders them. Three columns
    are `query-id passage-id rank` (MS MARCO) where the third is a whole number in the first line,
    and `query-id passage-id score` otherwise. Passages that the corpus lacks are left out, and
    queries without a line have no passages; how many is said in a warning.

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
    tops = _read(path, k, {query.id for query in queries})
    ids = sorted({passage_id for found in tops.values() for passage_id in found})
    rows = dict(zip(ids, corpus.rows_of(ids).tolist(), strict=True))
    unknown = sum(row < 0 for row in rows.values())
    missing = [query.id for query in queries if query.id not in tops]
    if not tops or unknown == len(ids):
        what = "query" if not tops else "passage"
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
        np.array([rows[one] for one in tops.get(query.id, ()) if rows[one] >= 0], np.int64)
        for query in queries
    ]


def _read(path: Path, k: int, wanted: set[str]) -> dict[str, list[str]]:
    """The ids of each wanted query's best k passages, the best first."""
    kept: dict[str, dict[str, float]] = {}
    columns, is_rank = 0, False
    for number, line in read_lines(path):
        words = _columns(decoded(line, path, number))
        if not columns:
            columns = len(words)
            is_rank = columns == SHORT_COLUMNS and words[2].isdecimal()
        if len(words) != columns or columns not in (TREC_COLUMNS, SHORT_COLUMNS):
            raise DataError(
                f"{path}:{number}: {len(words)} columns; expected TREC's query-id Q0 passage-id "
                "rank score tag, or query-id passage-id rank (or score), on every line alike"
            )
        query_id, passage_id = words[0], words[2 if columns == TREC_COLUMNS else 1]
        score = _score(words[4 if columns == TREC_COLUMNS else 2], is_rank, path, number)
        if query_id not in wanted:
            continue
        found = kept.setdefault(query_id, {})
        if not passage_id or "\0" in passage_id:
            check_id(passage_id, f"{path}:{number}")
        found[passage_id] = max(score, found.get(passage_id, -math.inf))
        if len(found) > KEPT_MEANWHILE * k:
            kept[query_id] = dict(_best(found, k))
    if not columns:
        raise DataError(f"{path}: the file has no line; expected a ranking")
    best = [max(found.values()) for found in kept.values()]
    if is_rank and best and max(best) < -1:
        raise DataError(
            f"{path}: no query has a passage of rank 0 or 1; if the third column has scores, write "
            "them with a decimal point"
        )
    return {query_id: [one for one, _ in _best(found, k)] for query_id, found in kept.items()}


def _columns(text: str) -> list[str]:
    """The columns of a line: between tabs where there are as many as needed, else between blanks.

    Only ASCII's blanks part columns, as in trec_eval; between tabs an id may hold blanks.
    """
    if "\t" in text:
        columns = [one.strip() for one in text.split("\t")]
        if len(columns) in (TREC_COLUMNS, SHORT_COLUMNS):
            return columns
    return text.split() if text.isascii() else BLANKS.split(text)


def _best(found: dict[str, float], k: int) -> list[tuple[str, float]]:
    return nlargest(k, found.items(), key=lambda one: (one[1], one[0]))


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
