"""Tevatron's tables: rows of training examples with their passages, and rows of passages.

Layout: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.corpus import SCHEMA
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.errors import DataError

log = logging.getLogger(__name__)

PASSAGE_COLUMNS = ("docid", "title", "text")
EXAMPLE_COLUMNS = ("query_id", "query", "positive_passages", "negative_passages")


class TevatronExamples:
    """Training examples by row of a memory-mapped `datasets.Dataset`.

    Rows without a query or without a positive passage are left out, with one warning that counts
    them.

    Args:
        rows: a `datasets.Dataset` with `EXAMPLE_COLUMNS`.
        where: its source, for messages.
        digest: names the contents.
    """

    def __init__(self, rows: Any, where: str, digest: str) -> None:
        table = arrow_table(rows)
        _check_examples(table, where)
        self._rows = rows
        self._kept = _usable_rows(table, where)
        self.digest = digest

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(self._kept[index])]
        return Example(
            Query(str(row["query_id"]), row["query"]),
            [_passage(record) for record in row["positive_passages"]],
            [_passage(record) for record in row["negative_passages"] or ()],
        )


def arrow_table(rows: Any) -> pa.Table:
    """The Arrow table under a `datasets.Dataset`, still mapped from disk."""
    return rows.with_format("arrow")[:]


def passage_table(table: pa.Table, where: str) -> pa.Table:
    """Columns `id`, `title`, `text` as strings; only a column of another type is copied."""
    _check_columns(table.schema, PASSAGE_COLUMNS, where)
    columns = [table[name] for name in PASSAGE_COLUMNS]
    for name, column in zip(PASSAGE_COLUMNS, columns, strict=True):
        _check_type(column.type, name, where)
    passages = pa.table(columns, names=SCHEMA.names).cast(SCHEMA)
    if passages["title"].null_count:
        passages = passages.set_column(1, SCHEMA.field("title"), passages["title"].fill_null(""))
    return passages


def check_passages(passages: pa.Table, where: str) -> None:
    """Refuse passages without id or text, and ids that are used twice.

    Raises:
        DataError: with how many there are.
    """
    for name in ("id", "text"):
        if missing := passages[name].null_count:
            raise DataError(f"{where}: {missing} of {len(passages)} passages have no {name}")
    ids = passages["id"]
    if (distinct := pc.count_distinct(ids).as_py()) != len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise DataError(
            f"{where}: {len(ids) - distinct} passages repeat an id (such as {repeated.as_py()!r})"
        )


def _check_columns(schema: pa.Schema, expected: Sequence[str], where: str) -> None:
    missing = [name for name in expected if name not in schema.names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(schema.names)}, "
            f"expected {', '.join(expected)}"
        )


def _check_type(got: pa.DataType, name: str, where: str) -> None:
    """Text everywhere; an id may be a whole number, and a title is null where no row has one."""
    text = pa.types.is_string(got) or pa.types.is_large_string(got)
    number = name.endswith("id") and pa.types.is_integer(got)
    untitled = name == "title" and pa.types.is_null(got)
    if not (text or number or untitled):
        raise DataError(f"{where}: column {name} holds {got}, expected strings")


def _check_examples(table: pa.Table, where: str) -> None:
    _check_columns(table.schema, EXAMPLE_COLUMNS, where)
    for name in ("query_id", "query"):
        _check_type(table.schema.field(name).type, name, where)
    for name in ("positive_passages", "negative_passages"):
        _check_passage_lists(table[name], f"{where}, {name}")


def _check_passage_lists(lists: pa.ChunkedArray, where: str) -> None:
    is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
    item = lists.type.value_type if is_list else None
    if item is not None and pa.types.is_null(item):
        return  # no row has a passage
    if item is None or not pa.types.is_struct(item):
        raise DataError(f"{where}: holds {lists.type}, expected lists of passages")
    fields = pa.schema(list(item))
    _check_columns(fields, PASSAGE_COLUMNS, where)
    for name in PASSAGE_COLUMNS:
        _check_type(fields.field(name).type, name, where)
    passages = pc.list_flatten(lists)
    for name in ("docid", "text"):
        if missing := pc.struct_field(passages, name).null_count:
            raise DataError(f"{where}: {missing} of {len(passages)} passages have no {name}")


def _usable_rows(table: pa.Table, where: str) -> np.ndarray:
    """Rows with a query and a positive passage, `(n_usable,) int64`; the others are counted."""
    asked = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["query"])), 0)
    answered = pc.greater(pc.list_value_length(table["positive_passages"]), 0)
    has_query, has_positive = (
        mask.fill_null(False).combine_chunks().to_numpy(zero_copy_only=False)
        for mask in (asked, answered)
    )
    kept = np.flatnonzero(has_query & has_positive)
    problems = f"{(~has_query).sum()} without a query, {(~has_positive).sum()} without a positive"
    if len(kept) == 0:
        raise DataError(f"{where}: none of {len(table)} rows can be trained on: {problems}")
    if len(kept) < len(table):
        left_out = len(table) - len(kept)
        log.warning("%s: left out: %d of %d rows (%s)", where, left_out, len(table), problems)
    return kept


def _passage(record: Mapping[str, Any]) -> Passage:
    return Passage(str(record["docid"]), record["title"] or "", record["text"])
