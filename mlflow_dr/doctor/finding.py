"""A finding of `mlflow-dr doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from mlflow_dr.errors import MlflowDrError, one_line

Level = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """The result of a check.

    Attributes:
        name: of what was checked.
        level: ok; warn, if some commands would fail; fail, if the usual ones would.
        text: what is there, or what is wrong and the way out.
    """

    name: str
    level: Level
    text: str


def caught(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is one, too."""
    try:
        yield from check()
    except MlflowDrError as error:
        yield Finding(name, "fail", str(error))
    except Exception as error:  # noqa: BLE001 - whatever is raised would be raised again in use
        yield Finding(name, "fail", one_line(error))
