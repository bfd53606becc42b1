"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlflow_dr.report.contents import MEAN, Curve, RunReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.4, 3.6  # inches, of a panel
# neighbours differ also for colour-blind readers (Okabe, Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
FULL = "full"


def shown_measure(key: str) -> str:
    """The name of a measure as people write it: `mrr@10` for `mrr_at_10`."""
    return key.replace("_at_", "@")


def curve_figure(report: RunReport) -> Figure:
    """The measure that decides, by every validation that has it, with intervals over queries."""
    figure, (panel,) = _figure(1)
    _draw_measure(panel, report)
    return figure


def overview_figure(report: RunReport) -> Figure:
    """The measure that decides, the other measures of its validation, and the training loss."""
    first = report.curves[0]
    others = [key for key in first.measures if key != report.metric.key]
    figure, panels = _figure(1 + bool(others) + bool(report.losses))
    left = list(panels)
    _draw_measure(left.pop(0), report)
    if others:
        panel = left.pop(0)
        for colour, key in zip(COLOURS, others, strict=False):
            label = shown_measure(key)
            panel.plot(*_points(first, key), "-o", color=colour, markersize=4, label=label)
        _finish(panel, f"other measures ({first.name})")
    if report.losses:
        _draw_losses(left.pop(0), report.losses)
    return figure


def loss_figure(losses: Sequence[tuple[int, float]]) -> Figure:
    """The training loss by step."""
    figure, (panel,) = _figure(1)
    _draw_losses(panel, losses)
    return figure


def _draw_losses(panel: Any, losses: Sequence[tuple[int, float]]) -> None:
    panel.plot(*zip(*losses, strict=True), color=COLOURS[6])
    _finish(panel, "training loss")


def lag_figure(report: RunReport) -> Figure:
    """Seconds that each checkpoint took to validate, and until its figures were there."""
    figure, panels = _figure(2)
    for panel, key, title in zip(
        panels,
        ("seconds", "lag_seconds"),
        ("seconds to validate a checkpoint", "seconds from READY to the figures"),
        strict=True,
    ):
        for colour, curve in zip(COLOURS, report.curves, strict=False):
            points = _points(curve, key)
            panel.plot(*points, "-o", color=colour, markersize=4, label=curve.name)
        panel.set_ylim(bottom=0)
        _finish(panel, title)
    return figure


def _draw_measure(panel: Any, report: RunReport) -> None:
    key = report.metric.key
    curves = [curve for curve in report.curves if key in curve.measures]
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = "-o" if curve.subset in (FULL, MEAN) else "--s"
        about = "full corpus" if curve.subset == FULL else curve.subset.partition(", ")[0]
        panel.plot(
            *_points(curve, key), line, color=colour, markersize=4, label=f"{curve.name}: {about}"
        )
        known = [
            (step, *curve.intervals[step][key])
            for step in curve.steps
            if key in curve.intervals.get(step, {})
        ]
        if known:
            steps, lows, highs = zip(*known, strict=True)
            panel.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    best = report.best.first
    panel.plot(
        best.checkpoint.step, best.value, "*", color="black", markersize=12, zorder=5, label="best"
    )
    _finish(panel, f"{shown_measure(key)}, with 95 % intervals over queries")


def _points(curve: Curve, key: str) -> tuple[list[int], list[float]]:
    found = [
        (step, values[key])
        for step, values in zip(curve.steps, curve.values, strict=True)
        if key in values
    ]
    return [step for step, _ in found], [value for _, value in found]


def _finish(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=10, parse_math=False)
    panel.set_xlabel("training step")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.25)
    if panel.get_legend_handles_labels()[0]:
        legend = panel.legend(fontsize=8)
        for label in legend.get_texts():
            label.set_parse_math(False)


def _figure(panels: int) -> tuple[Figure, Sequence[Any]]:
    # half a second to import; drawn without pyplot, which keeps every figure in memory
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * panels, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    drawn: Sequence[Any] = figure.subplots(1, panels, squeeze=False)[0]
    return figure, drawn
