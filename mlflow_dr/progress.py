"""Progress of long work: a bar in a terminal, and a line every few seconds elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class _PlainLines(tqdm):
    """tqdm's counting, printed as whole lines for log files and pipes."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the line as it stands."""
        self.fp.write(f"{msg or self}\n")
        self.fp.flush()

    def close(self) -> None:
        """End without a further line."""
        self.disable = True


def progress_bar(total: int | None, description: str, unit: str, quiet: bool = False) -> Any:
    """A tqdm bar to `update`; use it in a `with` block."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, unit=unit, disable=quiet, leave=False)
    return _PlainLines(
        total=total,
        desc=description,
        unit=unit,
        disable=quiet,
        mininterval=SECONDS_BETWEEN_LINES,
        delay=SECONDS_BETWEEN_LINES,
        ascii=True,
        ncols=0,
    )
