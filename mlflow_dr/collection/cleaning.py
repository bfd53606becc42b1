"""From a draft to training examples: codes become rows, and what cannot be used is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.drafts import NO_POSITIVE, Tally, list_array

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("query_tokens", pa.list_(pa.int32())),
        ("positives", pa.list_(pa.int32())),
        ("negatives", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("others", pa.list_(pa.int32())),
    ]
)
QUERY_COLUMNS = SCHEMA.names[:4]

UNKNOWN = "passages that the corpus lacks"
REPEATED = "passages listed twice for one query"
ALSO_POSITIVE = "negatives that are also positives of their query"
PARTLY_SCORED = "records with a teacher's scores for some of their passages only, so used without"


class Rows(NamedTuple):
    """What the codes of a draft stand for.

    Attributes:
        rows: row of each code, `(n_codes,) int64`; -1 where the corpus lacks the passage.
        names: id of each code, for messages; empty where no row is -1.
    """

    rows: np.ndarray
    names: Sequence[str] = ()


class _Side(NamedTuple):
    """One entry for each passage: example, code, row and score, all `(n_passages,)`."""

    owners: np.ndarray
    codes: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    def where(self, kept: np.ndarray) -> _Side:
        return _Side(*(column[kept] for column in self))


def cleaned(draft: pa.RecordBatch, known: Rows, tally: Tally) -> pa.RecordBatch:
    """Examples of `SCHEMA`; those that no positive is left of are dropped.

    Left out and counted: passages that the corpus lacks, repeats within one list, negatives that
    are positives of the same query too, and scores of examples that lack some.
    """
    ids = draft.column("query_id")
    positives, *rest = (
        _distinct(_known(_side(draft, name, known.rows), known, tally), ids, tally)
        for name in ("positives", "negatives", "others")
    )
    negatives, others = (_no_positives(side, positives, ids, tally) for side in rest)

    usable = np.bincount(positives.owners, minlength=len(draft)) > 0
    _count(tally, NO_POSITIVE, np.flatnonzero(~usable), ids)
    positives, negatives, others = (
        side.where(usable[side.owners]) for side in (positives, negatives, others)
    )
    scores = _scores(positives, negatives, len(draft), ids, tally)
    kept = draft.select(QUERY_COLUMNS).filter(pa.array(usable))
    lists = [
        _lists(positives.owners, positives.rows.astype(np.int32), usable),
        _lists(negatives.owners, negatives.rows.astype(np.int32), usable),
        _lists(*scores, usable),
        _lists(others.owners, others.rows.astype(np.int32), usable),
    ]
    return pa.record_batch([*kept.columns, *lists], schema=SCHEMA)


def _no_positives(side: _Side, positives: _Side, ids: pa.Array, tally: Tally) -> _Side:
    """Negatives without those that are positives of the same query."""
    also_positive = np.isin(_keys(side), _keys(positives))
    _count(tally, ALSO_POSITIVE, side.owners[also_positive], ids)
    return side.where(~also_positive)


def _side(draft: pa.RecordBatch, name: str, rows: np.ndarray) -> _Side:
    lengths = pc.list_value_length(draft.column(name)).to_numpy(zero_copy_only=False)
    codes = draft.column(name).flatten().to_numpy(zero_copy_only=False)
    scores = draft.column(f"{name.removesuffix('s')}_scores").flatten()
    owners = np.repeat(np.arange(len(draft)), lengths)
    return _Side(owners, codes, rows[codes], scores.to_numpy(zero_copy_only=False))


def _known(side: _Side, known: Rows, tally: Tally) -> _Side:
    unknown = side.rows < 0
    if unknown.any():
        case = repr(known.names[side.codes[unknown][0]])
        tally.add(UNKNOWN, case, int(unknown.sum()))
    return side.where(~unknown)


def _distinct(side: _Side, ids: pa.Array, tally: Tally) -> _Side:
    """Each passage once in each list, at its first place."""
    _, first = np.unique(_keys(side), return_index=True)
    again = np.ones(len(side.rows), bool)
    again[first] = False
    _count(tally, REPEATED, side.owners[again], ids)
    return side.where(~again)


def _keys(side: _Side) -> np.ndarray:
    """A number for each pair of example and row, `(n_passages,) int64`."""
    return side.owners * (np.int64(1) << 32) + side.rows


def _scores(
    positives: _Side, negatives: _Side, examples: int, ids: pa.Array, tally: Tally
) -> tuple[np.ndarray, np.ndarray]:
    """Owners and scores, positives before negatives, of examples all of whose passages have one."""
    owners = np.concatenate([positives.owners, negatives.owners])
    scores = np.concatenate([positives.scores, negatives.scores]).astype(np.float32)
    missing = np.bincount(owners, np.isnan(scores), examples)
    present = np.bincount(owners, ~np.isnan(scores), examples)
    _count(tally, PARTLY_SCORED, np.flatnonzero((missing > 0) & (present > 0)), ids)
    whole = missing[owners] == 0
    order = np.argsort(owners[whole], kind="stable")
    return owners[whole][order], scores[whole][order]


def _lists(owners: np.ndarray, values: np.ndarray, usable: np.ndarray) -> pa.Array:
    """One list for each usable example; `owners` ascend."""
    lengths = np.bincount(owners, minlength=len(usable))[usable]
    return list_array(np.concatenate([[0], np.cumsum(lengths)]), values)


def _count(tally: Tally, kind: str, owners: np.ndarray, ids: pa.Array) -> None:
    if len(owners):
        tally.add(kind, f"query {ids[int(owners[0])].as_py()!r}", len(owners))
