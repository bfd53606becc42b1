"""Parts that other packages add: dataset formats, subset strategies, losses and so on.

A part is registered under a name, by a decorator in Python or by an entry point of an installed
package. Entry points are loaded when their name is first asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mlflow_dr.errors import UsageError, did_you_mean, one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind, by name.

    Args:
        kind: what a part is called in messages, such as `loss`.
        group: the entry point group of other packages, such as `mlflow_dr.losses`.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to register it under a name.

        Raises:
            UsageError: the name is taken.
        """

        def decorate(part: T) -> T:
            if name in self._parts and self._parts[name] is not part:
                raise UsageError(f"a {self.kind} named {name!r} is already registered")
            self._parts[name] = part
            return part

        return decorate

    def names(self) -> list[str]:
        """All names, in alphabetical order; entry points are listed without loading them."""
        return sorted({*self._parts, *self._entry_points()})

    def get(self, name: str) -> T:
        """The part of a name.

        Raises:
            UsageError: no part has this name, or the package that offers it cannot be imported.
        """
        if name in self._parts:
            return self._parts[name]
        entry_points = self._entry_points()
        if name not in entry_points:
            names = ", ".join(self.names())
            raise UsageError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())} (known: {names})"
            )
        try:
            part: T = entry_points[name].load()
        except Exception as error:
            target = entry_points[name].value
            message = (
                f"the {self.kind} {name!r} cannot be imported from {target}: {one_line(error)}"
            )
            raise UsageError(message) from error
        return self._parts.setdefault(name, part)

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._entry_points()

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in _installed(tuple(sys.path)).select(group=self.group)}


@lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> Any:
    """The entry points of all packages on `sys.path`; reading them takes 15 ms."""
    return entry_points()
