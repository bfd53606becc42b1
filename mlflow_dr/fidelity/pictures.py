"""Pictures of a study of fidelity, by matplotlib; no window is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr.fidelity.agreement import Estimate, FidelityResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 10.0, 6.0, 120  # inches, dots per inch
FULL = "black"
# neighbours differ also for colour-blind readers (Okabe, Ito)
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#7f7f7f", "#8c564b", "#5e3c99"),
)
LINES = ("-", "--", ":")
LOG_FROM = 6.25  # ratio of the longest to the shortest time; below, a logarithmic axis has no ticks


def draw_curves(findings: FidelityResult, path: Path) -> None:
    """Write a PNG of the curve of every subset and of the full corpus."""
    curves_figure(findings).savefig(path, format="png", dpi=DPI)


def draw_time_against_fidelity(findings: FidelityResult, path: Path) -> None:
    """Write a PNG of each subset's time, and of how well it agrees with the full corpus."""
    time_figure(findings).savefig(path, format="png", dpi=DPI)


def curves_figure(findings: FidelityResult) -> Figure:
    """The picture that `draw_curves` writes; a dot marks the checkpoint that a curve chooses."""
    curves = [findings.full, *(subset.curve for subset in findings.subsets)]
    figure = _figure(
        f"{findings.collection}/{findings.split}: validated on subsets and on the full corpus\n"
        "(dot: the checkpoint that is chosen)",
        HEIGHT,
        len(curves),
    )
    panel = figure.subplots()
    for index, curve in enumerate(curves):
        colour, line = _style(index)
        width, size = (1.6, 7) if index else (3.0, 9)
        panel.plot(
            findings.steps, curve.means, line, color=colour, linewidth=width, label=curve.name
        )
        best = findings.steps[curve.best], curve.means[curve.best]
        panel.plot(*best, "o", color=colour, markersize=size, zorder=4)
    panel.set_xlabel("training step")
    panel.set_ylabel(findings.measure)
    _legend(figure, panel)
    return figure


def time_figure(findings: FidelityResult) -> Figure:
    """The picture that `draw_time_against_fidelity` writes: tau above, regret below."""
    from matplotlib.ticker import LogLocator, NullFormatter

    seconds = [findings.full.seconds, *(subset.curve.seconds for subset in findings.subsets)]
    figure = _figure(
        f"{findings.collection}/{findings.split}, {len(findings.steps)} checkpoints: time and "
        "agreement of subsets\n(points with 95 % intervals over queries; square: full corpus)",
        1.4 * HEIGHT,
        len(seconds),
    )
    upper, lower = figure.subplots(2, sharex=True)
    upper.set_ylabel("Kendall's tau with the full corpus")
    lower.set_ylabel(f"regret ({findings.measure})")
    lower.set_xlabel("seconds to validate one checkpoint")
    if max(seconds) / min(seconds) >= LOG_FROM:
        upper.set_xscale("log")
        upper.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.xaxis.set_minor_formatter(NullFormatter())
    upper.xaxis.set_major_formatter("{x:g}")
    tolerance = f"tolerance {findings.tolerance:g}"
    lower.axhline(findings.tolerance, color="grey", linewidth=1, linestyle="--", label=tolerance)
    for panel, name, full in ((upper, "tau", 1.0), (lower, "regret", 0.0)):
        label = {"label": findings.full.name} if panel is upper else {}
        panel.plot(findings.full.seconds, full, "s", color=FULL, markersize=9, zorder=4, **label)
        for index, subset in enumerate(findings.subsets, start=1):
            label = {"label": subset.curve.name} if panel is upper else {}
            estimate = getattr(subset.agreement, name)
            _point(panel, subset.curve.seconds, estimate, _style(index)[0], label)
        panel.margins(x=0.06, y=0.08)
        panel.grid(axis="y", alpha=0.25)
    _legend(figure, upper, lower)
    return figure


def _figure(title: str, height: float, n_curves: int) -> Figure:
    # half a second to import; drawn without pyplot, which keeps every figure in memory
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, max(height, 1.5 + 0.3 * n_curves)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _style(index: int) -> tuple[str, str]:
    """Colour and line of the full corpus (0) and of each subset, the same in both pictures."""
    if not index:
        return FULL, "-"
    return COLOURS[(index - 1) % len(COLOURS)], LINES[(index - 1) // len(COLOURS) % len(LINES)]


def _point(
    panel: Any, seconds: float, estimate: Estimate, colour: str, label: dict[str, str]
) -> None:
    """A figure with its interval; without a figure only the entry in the legend."""
    if estimate.has_interval:
        ends = (estimate.low, estimate.high)
        panel.plot((seconds, seconds), ends, color=colour, linewidth=2.5, alpha=0.7)
    panel.plot(seconds, estimate.value, "o", color=colour, markersize=8, zorder=3, **label)


def _legend(figure: Figure, *panels: Any) -> None:
    """The names of all curves to the right of the panels, dollar signs as they are."""
    handles = [panel.get_legend_handles_labels() for panel in panels]
    legend = figure.legend(
        [handle for some, _ in handles for handle in some],
        [label for _, some in handles for label in some],
        loc="outside right upper",
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
