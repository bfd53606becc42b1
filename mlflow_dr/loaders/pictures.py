"""The pictures of a loader study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow_dr.loaders.results import CellFigures, LoaderStudy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 10.0, 6.0, 120  # inches, dots per inch
# neighbours differ also for colour-blind readers (Okabe, Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
MARKERS = "osD^vP*X"
START_LINES = {"fork": "-", "forkserver": "--", "spawn": ":"}
HOST_PARTS = {
    "host_next_s": "waiting for the batch",
    "host_to_device_s": "to the device",
    "host_forward_s": "forward",
    "host_backward_s": "backward",
    "host_optimizer_s": "optimizer",
    "host_other_s": "other",
}
CPU_PARTS = {
    "cpu_lookup_s": "lookup",
    "cpu_tokenize_s": "tokenise",
    "cpu_collate_s": "collate",
    "cpu_transfer_s": "transfer",
    "cpu_main_s": "training process",
    "cpu_sampler_s": "measuring",
}


def memory_and_speed(study: LoaderStudy, appetite: float) -> Figure:
    """Private memory against documents a CPU second, a point a cell."""
    figure, (panel,) = _figure("Memory and speed of ways to load documents", 1)
    for number, cell in enumerate(study.measured):
        panel.plot(
            cell["samples_per_cpu_s"],
            cell["private_end_mb"],
            MARKERS[number // len(COLOURS) % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=9,
            label=cell.cell.label,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("documents a CPU second of all processes")
    panel.set_ylabel("private memory of all processes at the end, MB")
    _legend(panel)
    return figure


def speed_by_workers(study: LoaderStudy, appetite: float) -> Figure:
    """Documents a second by workers, and by ranks, with what the model takes as a line."""
    axes = (
        ("workers", "ranks")
        if any(cell.cell.ranks > 1 for cell in study.measured)
        else ("workers",)
    )
    figure, panels = _figure(f"Documents a second by {' and by '.join(axes)}", len(axes))
    for panel, name in zip(panels, axes, strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for cell in study.measured:
            if _is_plain(cell, name):
                shown = f"{cell.cell.store}, threads" if cell.cell.threads else cell.cell.store
                point = (int(getattr(cell.cell, name)), cell["samples_per_s"])
                series.setdefault(shown, []).append(point)
        for number, (shown, points) in enumerate(series.items()):
            xs, ys = zip(*sorted(points), strict=True)
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(xs, ys, "-o", color=colour, label=shown)
        if not math.isnan(appetite):
            panel.axhline(appetite, color="black", linestyle="--", label="what the model takes")
        panel.set_yscale("log")
        panel.set_xlabel(name)
        panel.set_xticks(sorted({x for points in series.values() for x, _ in points}))
        _legend(panel)
    panels[0].set_ylabel("documents a second")
    return figure


def _is_plain(measured: CellFigures, axis: str) -> bool:
    """Whether a cell differs from the usual ones in this axis alone."""
    cell = measured.cell
    if cell.ramdisk or cell.cache != "warm" or cell.start_method != "fork" or cell.pin_memory:
        return False
    return cell.ranks == 1 if axis == "workers" else not cell.workers


def memory_growth(study: LoaderStudy, appetite: float) -> Figure:
    """Private memory over the documents loaded, by store and start method."""
    figure, (panel,) = _figure("Private memory while documents are loaded", 1)
    stores = list(dict.fromkeys(cell.cell.store for cell in study.measured))
    for number, cell in enumerate(study.measured):
        points: Sequence[Sequence[float]] = cell.repeats[-1].get("memory_series", [])
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        panel.plot(
            xs,
            ys,
            START_LINES[cell.cell.start_method],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            color=COLOURS[stores.index(cell.cell.store) % len(COLOURS)],
            label=cell.cell.label,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("documents loaded")
    panel.set_ylabel("private memory of all processes, MB")
    _legend(panel)
    return figure


def where_time_goes(study: LoaderStudy, appetite: float) -> Figure:
    """Shares of the training process's time, and of the CPU time of all processes."""
    figure, panels = _figure("Where time goes", 2)
    labels = [cell.cell.label for cell in study.measured]
    titles = ("training process, share of wall time", "all processes, share of CPU time")
    for panel, parts, title in zip(panels, (HOST_PARTS, CPU_PARTS), titles, strict=True):
        lefts = [0.0] * len(labels)
        totals = [sum(_parts(cell, parts).values()) or 1.0 for cell in study.measured]
        for number, (name, shown) in enumerate(parts.items()):
            shares = [
                _parts(cell, parts)[name] / total
                for cell, total in zip(study.measured, totals, strict=True)
            ]
            panel.barh(labels, shares, left=lefts, color=COLOURS[number], label=shown)
            lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
        panel.set_xlabel(title)
        panel.invert_yaxis()
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7)
    panels[1].set_yticklabels([])
    return figure


def _parts(measured: CellFigures, names: Mapping[str, str]) -> dict[str, float]:
    return {name: 0.0 if math.isnan(measured[name]) else measured[name] for name in names}


def _figure(title: str, panels: int) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _legend(panel: Any) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7)


PICTURES: Mapping[str, Callable[[LoaderStudy, float], Figure]] = {
    "memory_and_speed.png": memory_and_speed,
    "speed_by_workers.png": speed_by_workers,
    "memory_growth.png": memory_growth,
    "where_time_goes.png": where_time_goes,
}
