"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_dr.terminal import printable


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells under one another, a line each, whatever the cells hold."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
