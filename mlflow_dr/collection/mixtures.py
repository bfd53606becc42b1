"""The notation of several training sets mixed by weight: `A@3+B@1`."""

from __future__ import annotations

import math

from mlflow_dr.errors import UsageError
from mlflow_dr.files import is_path

JOIN = "+"
WEIGHT = "@"


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """The names in `text` and their weights, None where one has no weight of its own.

    `+` joins, `@` sets a name and its weight apart. What is a path that exists is a name, whatever
    is in it, be it the whole text or one part with its `@`.

    Raises:
        UsageError: a name is empty, or a weight is no positive number.
    """
    if is_path(text):
        return [(text, None)]
    return [_part(part, text) for part in text.split(JOIN)]


def _part(part: str, whole: str) -> tuple[str, float | None]:
    part = part.strip()
    if is_path(part):
        return part, None
    name, at, weight = part.rpartition(WEIGHT) if WEIGHT in part else (part, "", "")
    if not name.strip():
        raise UsageError(
            f"dataset {whole!r}: a part without a name; a mixture is NAME@WEIGHT+NAME@WEIGHT, "
            "weights may be left out"
        )
    return name.strip(), _weight(weight, name, whole) if at else None


def _weight(text: str, name: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"{whole!r}: the weight of {name!r} is {text!r}, not a positive number")
    return weight
