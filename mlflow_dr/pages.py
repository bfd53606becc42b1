"""Pages of figures: one HTML file each, without scripts and without other files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from mlflow_dr.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_CELL = 200  # characters
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:68em;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;margin-bottom:.2em} h2{font-size:1.2em;margin:1.8em 0 .3em}
table{border-collapse:collapse;margin:.5em 0 1em;font-variant-numeric:tabular-nums}
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{background:#f5f5f5;font-weight:600} td.number,th.number{text-align:right;white-space:nowrap}
tr.best td{font-weight:600;background:#eef6ff}
svg{max-width:100%;height:auto} pre{background:#f5f5f5;padding:.6em .8em;white-space:pre-wrap}
p.lead{font-size:1.15em;margin:.4em 0} .quiet{color:#666}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A page of sections that are HTML already."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{text(title)}</h1>\n{body}\n</html>\n"
    )


def text(value: object) -> str:
    """A text as HTML, without control characters."""
    return escape(printable(str(value)))


def heading(title: str) -> str:
    """The heading of a section."""
    return f"<h2>{text(title)}</h2>"


def paragraph(*values: object, kind: str = "") -> str:
    """A paragraph for each text.

    Args:
        values: the texts.
        kind: `lead` for what is most important, `quiet` for what is least.
    """
    opening = f'<p class="{kind}">' if kind else "<p>"
    return "\n".join(f"{opening}{text(value)}</p>" for value in values)


def code(value: str) -> str:
    """A block of code."""
    return f"<pre>{escape(value)}</pre>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], marked: int | None = None) -> str:
    """A table; numbers are aligned to the right, and floats have four decimals.

    Args:
        heads: of the columns.
        rows: of cells; None is an empty cell, and a long text is cut.
        marked: the index of a row that is highlighted.
    """
    rows = [list(row) for row in rows]
    numeric = [
        bool(column) and all(value is None or isinstance(value, int | float) for value in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(heads)
    lines = ["<tr>" + "".join(map(_head, heads, numeric)) + "</tr>"]
    for index, row in enumerate(rows):
        opening = '<tr class="best">' if index == marked else "<tr>"
        lines.append(opening + "".join(map(_cell, row)) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _head(name: str, is_number: bool) -> str:
    return f'<th class="number">{text(name)}</th>' if is_number else f"<th>{text(name)}</th>"


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, int | float):
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        return f'<td class="number">{shown}</td>'
    shown = str(value)
    if len(shown) > LONGEST_CELL:
        shown = f"{shown[:LONGEST_CELL]}..."
    return f"<td>{text(shown)}</td>"


def picture(figure: Figure) -> str:
    """A figure of matplotlib as SVG in the page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]
