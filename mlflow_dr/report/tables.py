"""A run's figures as a table in Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlflow_dr.report.contents import Curve, RunReport
from mlflow_dr.report.figures import shown_measure

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def markdown_table(report: RunReport) -> str:
    """The first, the best and the last checkpoint of each validation, with intervals."""
    heads, rows = _cells(report)
    lines = [heads, ["---"] * len(heads), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def latex_table(report: RunReport) -> str:
    """The same as a `tabular`; it needs the package booktabs."""
    heads, rows = _cells(report)
    body = [" & ".join(map(_latex, line)) + r" \\" for line in (heads, *rows)]
    columns = "llr" + "l" * (len(heads) - 3)
    return "\n".join(
        [
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _latex(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)


def _cells(report: RunReport) -> tuple[list[str], list[list[str]]]:
    measures = list(dict.fromkeys(key for curve in report.curves for key in curve.measures))
    heads = ["validation", "checkpoint", "step", *map(shown_measure, measures)]
    rows = [
        [curve.name, which, str(curve.steps[index]), *_figures(curve, index, measures)]
        for curve in report.curves
        for which, index in _chosen(curve)
    ]
    return heads, rows


def _chosen(curve: Curve) -> Iterable[tuple[str, int]]:
    """What the shown checkpoints are, and their indices; one that is several things stands once."""
    named: dict[int, list[str]] = {}
    for which, index in (("first", 0), ("best", curve.best), ("last", len(curve.steps) - 1)):
        named.setdefault(index, []).append(which)
    return [(", ".join(which), index) for index, which in sorted(named.items())]


def _figures(curve: Curve, index: int, measures: Sequence[str]) -> Iterable[str]:
    """The value of each measure, with its interval where that is known."""
    intervals = curve.intervals.get(curve.steps[index], {})
    for key in measures:
        value = curve.values[index].get(key)
        if value is None:
            yield ""
        elif key in intervals:
            yield f"{value:.4f} [{intervals[key][0]:.4f}, {intervals[key][1]:.4f}]"
        else:
            yield f"{value:.4f}"
