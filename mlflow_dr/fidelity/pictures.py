"""Pictures of a study of fidelity, by matplotlib; no window is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_dr.fidelity.agreement import Curve, Estimate, FidelityResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 10.0, 6.0, 120  # inches, dots per inch
FULL = "black"
# in an order in which neighbours differ also for the colour-blind (Okabe, Ito)
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#5e3c99",
)
LINES = ("-", "--", ":")
LABEL = 10.0  # size of labels, in points
LOG_FROM = 6.25  # longest seconds by shortest; from here two ticks of 1, 2, 5 are in sight
POINTS = 72  # to the inch


def draw_curves(findings: FidelityResult, path: Path) -> None:
    """Write a PNG of the curve of every subset beside the full corpus's."""
    curves_figure(findings).savefig(path, format="png", dpi=DPI)


def draw_time_against_fidelity(findings: FidelityResult, path: Path) -> None:
    """Write a PNG of what each subset costs, and how well it stands for the full corpus."""
    time_figure(findings).savefig(path, format="png", dpi=DPI)


def curves_figure(findings: FidelityResult) -> Figure:
    """The picture that `draw_curves` writes; each curve's own choice has a dot."""
    curves = [findings.full, *(one.curve for one in findings.subsets)]
    figure = _figure(max(HEIGHT, 1.5 + 0.3 * len(curves)))
    panel = figure.subplots()
    styles = [(FULL, "-"), *map(_style, range(len(findings.subsets)))]
    for curve, (colour, line) in zip(curves, styles, strict=True):
        is_full = curve is findings.full
        width, layer = (3.0, 3) if is_full else (1.6, 2)
        panel.plot(findings.steps, curve.means, line, color=colour, linewidth=width, zorder=layer)
        best = findings.steps[curve.best], curve.means[curve.best]
        panel.plot(*best, "o", color=colour, markersize=9 if is_full else 7, zorder=layer + 2)
    panel.set_xlabel("training step")
    panel.set_ylabel(findings.measure)
    figure.suptitle(
        f"{findings.collection}/{findings.split}: validated on subsets and on the full corpus\n"
        "(dot: the checkpoint that is chosen)",
        fontsize=LABEL + 1,
        parse_math=False,
    )
    panel.margins(x=0.02, y=0.06)
    _label_ends(panel, curves, [colour for colour, _ in styles])
    return figure


def time_figure(findings: FidelityResult) -> Figure:
    """The picture that `draw_time_against_fidelity` writes: tau above, regret below."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(1.4 * HEIGHT)
    figure.suptitle(
        f"{findings.collection}/{findings.split}, {len(findings.steps)} checkpoints: what a subset "
        "costs, and how well it stands for the full corpus\n(points with 95 % intervals over "
        "queries; square: the full corpus itself)",
        fontsize=LABEL + 1,
        parse_math=False,
    )
    upper, lower = figure.subplots(2, sharex=True)
    upper.set_ylabel("Kendall's tau with the full corpus")
    lower.set_ylabel(f"regret ({findings.measure})")
    lower.set_xlabel("seconds to validate one checkpoint")
    if _ratio(findings) >= LOG_FROM:
        upper.set_xscale("log")
        upper.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.xaxis.set_minor_formatter(NullFormatter())
    upper.xaxis.set_major_formatter("{x:g}")
    lower.axhline(findings.tolerance, color="grey", linewidth=1, linestyle="--")
    lower.annotate(
        f"tolerance {findings.tolerance:g}",
        (1, findings.tolerance),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color="grey",
        annotation_clip=False,
    )
    curves = [findings.full, *(one.curve for one in findings.subsets)]
    colours = [FULL, *(_style(place)[0] for place in range(len(findings.subsets)))]
    for panel, name, of_full in ((upper, "tau", 1.0), (lower, "regret", 0.0)):
        panel.plot(findings.full.seconds, of_full, "s", color=FULL, markersize=9, zorder=4)
        for one, colour in zip(findings.subsets, colours[1:], strict=True):
            _point(panel, one.curve.seconds, getattr(one.agreement, name), colour)
        for curve, colour in zip(curves, colours, strict=True):
            panel.axvline(curve.seconds, color=colour, linewidth=0.6, alpha=0.45, zorder=0)
        panel.margins(x=0.06, y=0.08)
        panel.grid(axis="y", alpha=0.25)
    _label_tops(upper, curves, colours)
    return figure


def _figure(height: float) -> Figure:
    # only here: half a second to import; drawn without pyplot, which keeps every figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(place: int) -> tuple[str, str]:
    """Colour and line of a subset, the same in both pictures."""
    return COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]


def _ratio(findings: FidelityResult) -> float:
    seconds = [findings.full.seconds, *(one.curve.seconds for one in findings.subsets)]
    return max(seconds) / min(seconds)


def _point(panel: Any, seconds: float, estimate: Estimate, colour: str) -> None:
    if not estimate.is_defined:
        return
    if estimate.has_interval:
        ends = (estimate.low, estimate.high)
        panel.plot((seconds, seconds), ends, color=colour, linewidth=2.5, alpha=0.7)
    panel.plot(seconds, estimate.value, "o", color=colour, markersize=8, zorder=3)


def _label_ends(panel: Any, curves: Sequence[Curve], colours: Sequence[str]) -> None:
    """Each curve's name at its right end, those that would meet moved apart."""
    right = panel.get_xlim()[1]
    names = [
        panel.annotate(one.name, (right, one.means[-1]), (34, 0), va="center", **_label(colour))
        for one, colour in zip(curves, colours, strict=True)
    ]
    for name, move in zip(names, _moves(panel, names, 1, 1.4 * LABEL), strict=True):
        name.xyann = (34, move)


def _label_tops(panel: Any, curves: Sequence[Curve], colours: Sequence[str]) -> None:
    """Each curve's name above its seconds, likewise."""
    top, turned = panel.get_ylim()[1], {"rotation": 40, "rotation_mode": "anchor"}
    names = [
        panel.annotate(one.name, (one.seconds, top), (0, 18), **turned, **_label(colour))
        for one, colour in zip(curves, colours, strict=True)
    ]
    for name, move in zip(names, _moves(panel, names, 0, 1.9 * LABEL), strict=True):
        name.xyann = (move, 18)


def _moves(panel: Any, names: Sequence[Any], axis: int, gap: float) -> list[float]:
    """How far to move names along an axis, in points, to lie a gap apart beside their panel."""
    panel.figure.draw_without_rendering()  # which settles the layout
    points = POINTS / panel.figure.dpi
    ends = panel.transData.transform([name.xy for name in names])[:, axis] * points
    low, high = panel.bbox.get_points()[:, axis] * points
    moves: list[float] = (_apart(ends, gap, low, high) - ends).tolist()
    return moves


def _label(colour: str) -> dict[str, Any]:
    """A name in its colour, with a line to what it names."""
    return {
        "textcoords": "offset points",
        "color": colour,
        "fontsize": LABEL,
        "fontweight": "bold" if colour == FULL else "normal",
        "annotation_clip": False,
        "parse_math": False,
        "ha": "left",
        "arrowprops": {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "relpos": (0, 0.5),
            "shrinkA": 2,
            "shrinkB": 0,
        },
    }


def _apart(places: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Places moved as little as it takes to lie a gap apart, and within limits, in their order."""
    order = np.argsort(places, kind="stable")
    gaps = gap * np.arange(len(places))
    # less the gaps before them, places must not descend: those that do are pooled
    pools: list[tuple[float, int]] = []
    for place in (places[order] - gaps).tolist():
        mean, count = place, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    means = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    moved = np.empty(len(places))
    moved[order] = means.clip(low, max(low, high - gaps[-1])) + gaps
    return moved
