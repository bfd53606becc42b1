"""Which parts of a `mlflow-dr qa` are finished, in a file of its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow_dr.errors import DataError, MlflowDrError, UsageError
from mlflow_dr.files import atomic_write

FILE = "parts.json"


class FinishedParts:
    """The finished parts in a folder, each with what it has found and its seconds.

    Args:
        folder: of all that is written.
        settings: part -> what it depends on, which may not change once it is finished.
        force: forget what is finished.

    Raises:
        UsageError: a part was finished with other settings.
        DataError: its file is damaged.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Mapping[str, Any]], force: bool = False
    ) -> None:
        self._path = folder / FILE
        self._settings = json.loads(json.dumps(settings))
        self._parts: dict[str, dict[str, Any]] = {}
        if self._path.exists() and not force:
            self._parts = self._read()

    def __getitem__(self, name: str) -> dict[str, Any]:
        """What a finished part has found."""
        found: dict[str, Any] = self._parts[name]["found"]
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    @property
    def seconds(self) -> dict[str, float]:
        """Part -> how long it took."""
        return {name: float(part["seconds"]) for name, part in self._parts.items()}

    def do(self, name: str, work: Callable[[], Mapping[str, Any]]) -> bool:
        """Do a part that is not finished.

        Returns:
            Whether it was done now.

        Raises:
            MlflowDrError: it failed; the message has its name and the way out.
        """
        if name in self._parts:
            return False
        start = time.monotonic()
        try:
            found = dict(work())
        except MlflowDrError as error:
            if self._parts:
                error.args = (f"{name}: {error}; the next call goes on with this part",)
            raise
        self._parts[name] = {
            "seconds": round(time.monotonic() - start, 2),
            "settings": self._settings[name],
            "found": found,
        }
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(self._parts, indent=2) + "\n", encoding="utf-8")
        return True

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            parts = json.loads(self._path.read_text(encoding="utf-8"))
            is_whole = all(
                {"seconds", "settings", "found"} <= part.keys() and name in self._settings
                for name, part in parts.items()
            )
        except (OSError, ValueError, AttributeError):
            is_whole = False
        if not is_whole:
            raise DataError(f"{self._path}: damaged; --force begins anew, or name another --output")
        for part in parts:
            for name, now in self._settings[part].items():
                before = parts[part]["settings"].get(name)
                if before != now:
                    raise UsageError(
                        f"{self._path.parent}: {part} was done with {name} {before}, and not {now};"
                        " pass the same, name another --output, or begin anew with --force"
                    )
        return dict(parts)
