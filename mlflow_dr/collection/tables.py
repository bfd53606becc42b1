"""Passages as a memory-mapped table in Tevatron's columns, as `datasets` reads them.

Layout: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.corpus import SCHEMA, check_ids
from mlflow_dr.errors import DataError, quoted

PASSAGE_COLUMNS = ("docid", "title", "text")
TITLE = "title"


def arrow_table(rows: Any) -> pa.Table:
    """The Arrow table under a `datasets.Dataset`, still mapped from disk."""
    return rows.with_format("arrow")[:]


def passage_table(table: pa.Table, where: str) -> pa.Table:
    """Columns `id`, `title`, `text` as strings; only a column of another type is copied.

    Raises:
        DataError: `docid` or `text` is missing, or a column is of another type.
    """
    if TITLE not in table.column_names:
        table = table.append_column(TITLE, pa.nulls(len(table)))
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
    try:
        check_ids(ids)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if (distinct := pc.count_distinct(ids).as_py()) != len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise DataError(
            f"{where}: {len(ids) - distinct} passages repeat an id (such as "
            f"{quoted(repeated.as_py())})"
        )


def _check_columns(schema: pa.Schema, expected: Sequence[str], where: str) -> None:
    missing = [name for name in expected if name not in schema.names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(schema.names)}, "
            f"expected {', '.join(expected)} ({TITLE} may be left out)"
        )


def _check_type(got: pa.DataType, name: str, where: str) -> None:
    """Text everywhere; an id may be a whole number, and a title is null where no row has one."""
    text = pa.types.is_string(got) or pa.types.is_large_string(got)
    number = name.endswith("id") and pa.types.is_integer(got)
    untitled = name == TITLE and pa.types.is_null(got)
    if not (text or number or untitled):
        raise DataError(f"{where}: column {name} holds {got}, expected strings")
