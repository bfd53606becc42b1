"""One page with the figures of a `mlflow-dr qa`: both curves, tables and some answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr import pages
from mlflow_dr.files import atomic_write
from mlflow_dr.qa.progress import FinishedParts
from mlflow_dr.qa.questions import DEV
from mlflow_dr.tracking.results import TIMINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "page.html"
EXAMPLES = 12


def write_qa_page(
    folder: Path, dataset: str, parts: FinishedParts, runs: Mapping[str, str]
) -> Path:
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
        pages.table(("run", "id"), ids.items()),
        pages.heading("Curves"),
        _picture(retriever["curve"], reader["curve"]),
        pages.heading("Retriever"),
        _curve_table(retriever),
        pages.heading("Passages that were found"),
        pages.paragraph(
            "accuracy@k is the share of questions with an answer in the first k passages."
        ),
        pages.table(
            ("questions", *parts["results"][DEV]),
            ((split, *values.values()) for split, values in parts["results"].items()),
        ),
        pages.heading("Reader"),
        _curve_table(reader),
        pages.heading("Answers of the best reader"),
        _answer_table(parts["predictions"]),
        pages.heading("Some predictions"),
        _predictions(folder / "predictions.json"),
        pages.heading("Time"),
        pages.table(("part", "seconds"), ((name, f"{value:.1f}") for name, value in rows)),
    ]
    page = folder / PAGE
    with atomic_write(page) as partial:
        title = f"Question answering on {dataset}"
        partial.write_text(pages.page(title, sections), encoding="utf-8")
    return page


def _measures(curve: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """The names of a curve's measures; times are left out."""
    names = curve[0][1] if curve else {}
    return [name for name in names if name not in TIMINGS]


def _curve_table(part: Mapping[str, Any]) -> str:
    names = _measures(part["curve"])
    rows = [(step, *(values.get(name) for name in names)) for step, values in part["curve"]]
    best = pages.paragraph(f"The best by {part['measure']} is that of step {part['step']}.")
    return pages.table(("step", *names), rows) + best


def _answer_table(values: Mapping[str, float]) -> str:
    """A row for each number of passages."""
    names = list(dict.fromkeys(name.partition("@")[0] for name in values))
    counts = list(dict.fromkeys(name.partition("@")[2] for name in values))
    rows = [(count, *(values[f"{name}@{count}"] for name in names)) for count in counts]
    return pages.table(("passages", *names), rows)


def _predictions(path: Path) -> str:
    """Some questions, evenly spaced, with the answers from the most passages."""
    answered = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for record in answered[:: max(1, len(answered) // EXAMPLES)][:EXAMPLES]:
        last = record["predictions"][-1]["prediction"]
        gold = "; ".join(record["gold_answers"])
        rows.append((record["question"], gold, last["text"], last.get("passage", "")))
    return pages.table(("question", "answers", "prediction", "passage"), rows)


def _picture(*curves: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """Both curves side by side, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for panel, title, curve in zip(panels, ("retriever", "reader"), curves, strict=True):
        _draw(panel, title, curve)
    return pages.picture(figure)


def _draw(panel: Axes, title: str, curve: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    for name in _measures(curve):
        points = [(step, values[name]) for step, values in curve if name in values]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    panel.set_title(title)
    panel.set_xlabel("training step")
    panel.set_ylim(bottom=0)
    if curve:
        panel.legend(fontsize="small")
