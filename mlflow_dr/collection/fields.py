"""Fields of raw records: the value in the type that is expected, or an error that says where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlflow_dr.collection.recordfiles import Record
from mlflow_dr.errors import LONGEST_QUOTE, DataError, quoted
from mlflow_dr.terminal import shortened

LARGEST_ID = 10**100
LARGEST_NUMBER = 3.4e38


def identifier(record: Record, field: str, where: str) -> str:
    """An id: a string that `check_id` allows, or a whole number, as a string.

    Raises:
        DataError: it is missing or something else.
    """
    value = record.get(field)
    if isinstance(value, str) and value:
        return check_id(value, where)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_ID:
        return str(value)
    raise DataError(f"{where}: no {field!r}, or not a string; got {quoted(value)}")


def check_id(value: str, where: str) -> str:
    """An id that judgements can name and trec_eval can read; given back as it is.

    Raises:
        DataError: it is empty, has white space at its start or end, or a NUL character, where
            trec_eval's strings end.
    """
    if not value:
        raise DataError(f"{where}: an id is empty; expected a string such as 'p1'")
    if "\0" in value or value != value.strip():
        fault = "a NUL character" if "\0" in value else "white space at its start or end"
        raise DataError(
            f"{where}: id {quoted(value)} has {fault}; remove it, because files of judgements and "
            "trec_eval cannot name such an id"
        )
    return value


def fields_of(record: Record) -> str:
    """The names of a record's fields, for messages."""
    return shortened(", ".join(record), LONGEST_QUOTE) or "(none)"


def optional_identifier(record: Record, fields: Sequence[str], where: str) -> str:
    """The id under the first of these fields that the record has; empty where it has none."""
    for field in fields:
        if record.get(field) not in (None, ""):
            return identifier(record, field, where)
    return ""


def text(record: Record, field: str, where: str) -> str:
    """A string, which may be empty.

    Raises:
        DataError: it is missing or no string.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where}: no {field!r}, or not a string; got {quoted(value)}")
    return value


def optional_text(record: Record, field: str, where: str) -> str:
    """A string; empty where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is not a string; got {quoted(value)}")
    return value


def listed(record: Record, field: str, where: str) -> list[Any]:
    """A list; empty where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: {field!r} is not a list; got {type(value).__name__}")
    return value


def identifiers(record: Record, field: str, where: str) -> list[str]:
    """A list of ids.

    Raises:
        DataError: with the index of the first that is none.
    """
    values = listed(record, field, where)
    # one look at most lists: a training file has tens of millions of ids
    if all(type(value) is str for value in values):
        joined = " ".join(values)
        if "\0" not in joined and joined.split() == values:
            return values
    return [
        identifier({field: value}, field, f"{where}: {field}[{index}]")
        for index, value in enumerate(values)
    ]


def texts(record: Record, field: str, where: str) -> tuple[str, ...]:
    """Strings, of a list or one alone; none where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    values = [value] if isinstance(value, str) else listed(record, field, where)
    for each in values:
        if not isinstance(each, str):
            raise DataError(f"{where}: {field!r} holds {quoted(each)}, expected strings")
    return tuple(values)


def number(record: Record, field: str, where: str) -> float:
    """A number that fp32 can hold; NaN where the record has none.

    Raises:
        DataError: it is something else.
    """
    value = record.get(field)
    if value is None:
        return math.nan
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not (plain and -LARGEST_NUMBER <= value <= LARGEST_NUMBER):
        raise DataError(f"{where}: {field!r} is not a finite number; got {quoted(value)}")
    return float(value)


def text_or_tokens(value: Any, where: str) -> tuple[str, list[int] | None]:
    """Text and None, or no text and token ids: what Tevatron and Asyncval write into one field.

    Raises:
        DataError: it is neither a string nor a list of whole numbers from 0 to 2^31 - 1.
    """
    if isinstance(value, str):
        return value, None
    # types and limits by built-in functions: a corpus has a thousand million tokens
    whole = isinstance(value, list) and set(map(type, value)) <= {int}
    if whole and (not value or (min(value) >= 0 and max(value) < 2**31)):
        return "", value
    raise DataError(f"{where}: neither a string nor a list of token ids; got {quoted(value)}")
