"""A study of fidelity in words, as a table, in files and in pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.fidelity_study.agreement import (
    FIGURES,
    FidelityResult,
    StudiedSubset,
    StudyFigure,
    SubsetCurve,
)
from mlflow_dr.files import atomic_write
from mlflow_dr.terminal import in_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, TABLE, VALUES = "report.txt", "table.csv", "values.parquet"
CURVES, TIME = "curves.png", "time_against_fidelity.png"
SIZES = ("subset", "passages", "queries", "seconds")
HEADS = (*SIZES, "Kendall's tau", "Pearson", "regret", "inflation", "chooses")
COLUMNS = (
    *("subset", "passages", "queries", "seconds", "share_of_seconds"),
    *(f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")),
    *("chosen_step", "recommended", "worst_error", "covered"),
)
FORMATS = {"tau": ".3f", "pearson": ".3f", "regret": ".4f", "inflation": "+.4f"}
MARK, REFINE = "*", "`--refine full@3`"

WIDTH, HEIGHT, DPI = 10.0, 6.0, 120  # inches, dots per inch
FULL = "black"
# neighbours differ also for colour-blind readers (Okabe, Ito)
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#7f7f7f", "#8c564b", "#5e3c99"),
)
LINES = ("-", "--", ":")
LOG_FROM = 6.25  # ratio of the longest to the shortest time; below, a logarithmic axis has no ticks


def report_text(findings: FidelityResult) -> str:
    """The table, the checkpoints that were skipped, and the recommendation."""
    n_queries = len(findings.full.query_ids)
    lines = [
        f"{findings.measure} of {len(findings.steps)} checkpoints (steps {findings.steps[0]} to "
        f"{findings.steps[-1]}) of {n_queries} queries of {_shown(findings)}, with 95 % intervals "
        "over queries",
        "",
        in_columns(_rows(findings)),
        "",
    ]
    if findings.collections:
        lines += ["of each collection:", "", in_columns(_collection_rows(findings)), ""]
    if estimates := [
        estimate_text(findings, each) for each in findings.subsets if each.is_estimate
    ]:
        lines += [*estimates, ""]
    if findings.skipped:
        lines.append(f"checkpoints passed over: {len(findings.skipped)}")
        lines += [f"  step {step}: {reason}" for step, reason in findings.skipped.items()]
        lines.append("")
    return "\n".join([*lines, recommendation(findings)])


def estimate_text(findings: FidelityResult, studied: StudiedSubset) -> str:
    """How near estimates are to the full corpus's values, in a line."""
    covered = np.zeros(0) if studied.covered is None else studied.covered
    return (
        f"{studied.curve.name}: off by {studied.errors.mean():+.4f} on average, at worst by "
        f"{studied.errors[studied.worst]:+.4f} (step {findings.steps[studied.worst]}); the full "
        f"corpus's value is within the interval of {covered.sum()} of {len(covered)} checkpoints"
    )


def recommendation(findings: FidelityResult) -> str:
    """Which subset to validate on, in words."""
    best, measure = findings.recommended, findings.measure
    if findings.spread.is_flat:
        return (
            f"No order can be told: on the full corpus the checkpoints differ by "
            f"{findings.spread.observed:.4f} {measure}, and were they all equally good, other "
            f"queries would make up to {findings.spread.by_chance:.4f} of it. Study checkpoints "
            "that lie further apart, or more queries."
        )
    if best is not None:
        return _praise(findings, best)
    if findings.trusted:
        names = ", ".join(subset.curve.name for subset in findings.trusted)
        return f"The full corpus: {names} can be trusted, but none of them is faster."
    closest = max(
        findings.subsets,
        key=lambda subset: (np.nan_to_num(subset.agreement.tau.value), -subset.share),
    )
    refine = "" if closest.curve.is_other else f" ({REFINE} of `mlflow-dr validate`)"
    return (
        f"None of these subsets can be trusted: none chooses a checkpoint within "
        f"{findings.tolerance:g} {measure} of the best and orders them better than chance would. "
        f"Let the full corpus decide among the best that {closest.curve.name} finds{refine}, or "
        "study larger subsets."
    )


def write_files(findings: FidelityResult, directory: Path) -> list[Path]:
    """Write the report, the table, the values of all queries, and two pictures.

    Args:
        findings: what was found.
        directory: is made if it is new.

    Returns:
        The files.
    """
    writers = {
        REPORT: lambda path: path.write_text(report_text(findings) + "\n", encoding="utf-8"),
        TABLE: lambda path: _write_table(findings, path),
        VALUES: lambda path: pq.write_table(values_table(findings), path, compression="zstd"),
        CURVES: lambda path: draw_curves(findings, path),
        TIME: lambda path: draw_time_against_fidelity(findings, path),
    }
    for name, write in writers.items():
        with atomic_write(directory / name) as partial:
            write(partial)
    return [directory / name for name in writers]


def values_table(findings: FidelityResult) -> pa.Table:
    """The values of all queries: columns `strategy`, `step`, `query_id` and `value`."""
    curves = [findings.full, *(subset.curve for subset in findings.subsets)]
    return pa.concat_tables(_values(findings.steps, curve) for curve in curves).combine_chunks()


def _values(steps: tuple[int, ...], curve: SubsetCurve) -> pa.Table:
    n_queries = len(curve.query_ids)
    return pa.table(
        {
            "strategy": pa.array([curve.name] * curve.values.size),
            "step": pa.array(np.repeat(np.array(steps, np.int64), n_queries)),
            "query_id": pa.array(list(curve.query_ids) * len(steps)),
            "value": pa.array(curve.values.ravel()),
        }
    )


def _rows(findings: FidelityResult) -> list[tuple[str, ...]]:
    """Two lines for each subset: its figures, and their intervals below."""
    full, best = findings.full, findings.recommended
    rows = [HEADS, (*_size(full), *("-" for _ in FIGURES), f"step {findings.steps[full.best]}")]
    for subset in findings.subsets:
        estimates = [(_estimate(subset, name), FORMATS[name]) for name in FIGURES]
        figures = [format(x.value, form) if x.is_defined else "-" for x, form in estimates]
        intervals = [_interval(x, form) for x, form in estimates]
        mark = f" {MARK}" if subset is best else ""
        rows.append(
            (*_size(subset.curve), *figures, f"step {findings.steps[subset.curve.best]}{mark}")
        )
        rows.append(("", "", "", "", *intervals, ""))
    return rows


def _collection_rows(findings: FidelityResult) -> list[tuple[str, ...]]:
    """The rows of each collection of a suite."""
    rows: list[tuple[str, ...]] = [("collection", *HEADS)]
    for name, found in findings.collections.items():
        first, *others = _rows(found)[1:]
        rows += [(name, *first), *(("", *row) for row in others)]
    return rows


def _shown(findings: FidelityResult) -> str:
    """The collection and its split; a suite has no split."""
    return f"{findings.collection}/{findings.split}".rstrip("/")


def _size(curve: SubsetCurve) -> tuple[str, ...]:
    sizes = (str(curve.passages), str(len(curve.query_ids)))
    return curve.name, *sizes, f"{curve.seconds:.2f}"


def _interval(estimate: StudyFigure, form: str) -> str:
    ends = (estimate.low, estimate.high)
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if estimate.has_interval else ""


def _estimate(compared: StudiedSubset, name: str) -> StudyFigure:
    estimate: StudyFigure = getattr(compared.agreement, name)
    return estimate


def _praise(findings: FidelityResult, best: StudiedSubset) -> str:
    curve, figures, measure = best.curve, best.agreement, findings.measure
    chosen, wanted = findings.steps[curve.best], findings.steps[findings.full.best]
    right = "as the full corpus does" if chosen == wanted else f"the full corpus step {wanted}"
    text = (
        f"Validate on {curve.name}: {best.share:.0%} of the full corpus's time ({curve.seconds:.2f}"
        f" s instead of {findings.full.seconds:.2f} s a checkpoint). It chooses step {chosen}, "
        f"{right} (regret {figures.regret.value:.4f} {measure}), and orders the checkpoints with "
        f"tau {figures.tau.value:.3f}. "
    )
    if figures.regret.high > findings.tolerance:
        text += (
            f"On other queries the regret might be {figures.regret.high:.4f}, more than the "
            f"tolerance of {findings.tolerance:g}: "
        )
        text += "let" if curve.is_other else f"{REFINE} lets"
        text += " the full corpus decide among the best. "
    if best.is_estimate:
        return text + estimate_text(findings, best) + "."
    return (
        f"{text}Its values differ by {figures.inflation.value:+.4f} from the full corpus's: "
        "compare them with each other only."
    )


def _write_table(findings: FidelityResult, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows(finding_rows(findings))


def finding_rows(findings: FidelityResult) -> Iterator[list[Any]]:
    """The full corpus and each subset with the numbers of `COLUMNS`; empty where undefined.

    Those of each collection of a suite follow.
    """
    full = findings.full
    chosen = findings.steps[full.best]
    yield [*_numbers(full, 1.0), *[""] * len(FIGURES) * 3, chosen, "", "", ""]
    for subset in findings.subsets:
        curve = subset.curve
        figures = ["" if np.isnan(x) else x for estimate in subset.agreement for x in estimate]
        chosen = findings.steps[curve.best]
        recommended = "yes" if subset is findings.recommended else ""
        worst = subset.errors[subset.worst]
        covered = "" if subset.covered is None else subset.covered.mean()
        yield [*_numbers(curve, subset.share), *figures, chosen, recommended, worst, covered]
    for name, found in findings.collections.items():
        yield from ([f"{name}: {row[0]}", *row[1:]] for row in finding_rows(found))


def _numbers(curve: SubsetCurve, share: float) -> list[Any]:
    return [curve.name, curve.passages, len(curve.query_ids), curve.seconds, share]


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
        f"{_shown(findings)}: validated on subsets and on the full corpus\n"
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
        if curve.intervals is not None:
            panel.fill_between(findings.steps, *curve.intervals.T, color=colour, alpha=0.15)
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
        f"{_shown(findings)}, {len(findings.steps)} checkpoints: time and "
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
    panel: Any, seconds: float, estimate: StudyFigure, colour: str, label: dict[str, str]
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
