"""One page with the figures of a `mlflow-dr qa`: both curves, tables and some answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr.files import atomic_write
from mlflow_dr.qa.progress import FinishedParts
from mlflow_dr.qa.questions import DEV
from mlflow_dr.tracking.results import TIMINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "page.html"
EXAMPLES = 12
LONGEST_TEXT = 200  # characters
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}"
    "svg{max-width:100%;height:auto}"
)


def write_page(folder: Path, dataset: str, parts: FinishedParts, runs: Mapping[str, str]) -> Path:
    """Write the page of finished parts.

    Args:
        folder: has the predictions, and gets the page.
        dataset: the name of the collection.
        parts: all of them are finished.
        runs: other MLflow runs that the page names, by what they are.

    Returns:
        The page: HTML without other files.
    """
    retriever, reader = parts["retriever"], parts["reader"]
    ids = {**runs, "retriever": retriever["run"], "reader": reader["run"]}
    seconds = parts.seconds
    rows = [*seconds.items(), ("all", sum(seconds.values()))]
    sections = [
        f"<h1>Question answering on {escape(dataset)}</h1>",
        _table(("run", "id"), ids.items()),
        "<h2>Curves</h2>",
        _picture(retriever["curve"], reader["curve"]),
        "<h2>Retriever</h2>",
        _curve_table(retriever),
        "<h2>Passages that were found</h2>",
        "<p>accuracy@k is the share of questions with an answer in the first k passages.</p>",
        _table(
            ("questions", *parts["results"][DEV]),
            ((split, *values.values()) for split, values in parts["results"].items()),
        ),
        "<h2>Reader</h2>",
        _curve_table(reader),
        "<h2>Answers of the best reader</h2>",
        _answer_table(parts["predictions"]),
        "<h2>Some predictions</h2>",
        _predictions(folder / "predictions.json"),
        "<h2>Time</h2>",
        _table(("part", "seconds"), ((name, f"{value:.1f}") for name, value in rows)),
    ]
    page = folder / PAGE
    with atomic_write(page) as partial:
        partial.write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>Question answering</title><style>{STYLE}</style>\n"
            + "\n".join(sections)
            + "\n</html>\n",
            encoding="utf-8",
        )
    return page


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{_cell(value)}</td>" for value in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = str(value)
    return escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...")


def _measures(curve: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """The names of a curve's measures; times are left out."""
    names = curve[0][1] if curve else {}
    return [name for name in names if name not in TIMINGS]


def _curve_table(part: Mapping[str, Any]) -> str:
    names = _measures(part["curve"])
    rows = [(step, *(values.get(name, "") for name in names)) for step, values in part["curve"]]
    best = f"<p>The best by {escape(part['measure'])} is that of step {part['step']}.</p>"
    return _table(("step", *names), rows) + best


def _answer_table(values: Mapping[str, float]) -> str:
    """A row for each number of passages."""
    names = list(dict.fromkeys(name.partition("@")[0] for name in values))
    counts = list(dict.fromkeys(name.partition("@")[2] for name in values))
    rows = [(count, *(values[f"{name}@{count}"] for name in names)) for count in counts]
    return _table(("passages", *names), rows)


def _predictions(path: Path) -> str:
    """Some questions, evenly spaced, with the answers from the most passages."""
    answered = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for record in answered[:: max(1, len(answered) // EXAMPLES)][:EXAMPLES]:
        last = record["predictions"][-1]["prediction"]
        gold = "; ".join(record["gold_answers"])
        rows.append((record["question"], gold, last["text"], last.get("passage", "")))
    return _table(("question", "answers", "prediction", "passage"), rows)


def _picture(*curves: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """Both curves side by side, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for panel, title, curve in zip(panels, ("retriever", "reader"), curves, strict=True):
        _draw(panel, title, curve)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _draw(panel: Axes, title: str, curve: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    for name in _measures(curve):
        points = [(step, values[name]) for step, values in curve if name in values]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    panel.set_title(title)
    panel.set_xlabel("training step")
    panel.set_ylim(bottom=0)
    if curve:
        panel.legend(fontsize="small")
