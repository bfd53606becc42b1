"""The layouts of training files, and which of them a file is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.dpr import dpr_example, dpr_example_with_others
from mlflow_dr.collection.drafts import RawExample
from mlflow_dr.collection.fields import fields_of
from mlflow_dr.collection.recordfiles import Record, read_records
from mlflow_dr.collection.tevatron import plain_example, tevatron_example
from mlflow_dr.collection.tevatron_ids import id_example
from mlflow_dr.errors import DataError


class Layout(NamedTuple):
    """How the records of a file are laid out.

    Attributes:
        name: what people call it.
        fields: those that it needs, for messages.
        mark: the field that no other layout has.
        by_id: whether its passages are ids, to be looked up in a corpus.
        example: a record, its index in the source and its place -> a raw example.
        with_others: the same with DPR's `negative_ctxs`; None for a layout without them.
    """

    name: str
    fields: str
    mark: str
    by_id: bool
    example: Callable[[Record, int, str], RawExample]
    with_others: Callable[[Record, int, str], RawExample] | None = None


LAYOUTS = (
    Layout(
        "Tevatron",
        "query, positive_passages",
        "positive_passages",
        False,
        tevatron_example,
    ),
    Layout(
        "Tevatron by id",
        "query_text, positive_document_ids",
        "positive_document_ids",
        True,
        id_example,
    ),
    Layout("Tevatron tokenised", "query, positives", "positives", False, plain_example),
    Layout(
        "DPR",
        "question, positive_ctxs",
        "positive_ctxs",
        False,
        dpr_example,
        dpr_example_with_others,
    ),
)


def recognised(record: Record) -> Layout | None:
    """The layout that a record is in; None for an unknown one."""
    return next((layout for layout in LAYOUTS if layout.mark in record), None)


def layout_of(files: Sequence[Path]) -> Layout:
    """The layout of the first record that these files hold.

    Raises:
        DataError: they hold none, or its fields are of no known layout; or the file is damaged.
    """
    for file in files:
        for where, record in read_records(file):
            if layout := recognised(record):
                return layout
            known = "; ".join(f"{layout.name} ({layout.fields})" for layout in reversed(LAYOUTS))
            raise DataError(
                f"{where}: a record with the fields {fields_of(record)}; training "
                f"examples have those of one of: {known}"
            )
    raise DataError(f"{', '.join(map(str, files))}: no records; expected training examples")


def raw_examples(files: Sequence[Path], layout: Layout) -> Iterator[RawExample]:
    """The records of all files, in order, numbered from 0 through all of them.

    Raises:
        DataError: a file is damaged or a record not in this layout, with file:line.
    """
    indexes = count()
    for file in files:
        for where, record in read_records(file):
            if layout.mark not in record:
                raise DataError(
                    f"{where}: no {layout.mark!r}, which the records before it have; it has "
                    f"{fields_of(record)}"
                )
            yield layout.example(record, next(indexes), where)
