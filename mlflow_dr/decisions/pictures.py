"""Pictures, by matplotlib; no window is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 9.0, 3.4  # inches, of each panel
BETTER, WORSE = "tab:blue", "tab:red"


def draw_changes(path: Path, titles: Sequence[str], changes: np.ndarray, measure: str) -> None:
    """Write a PNG of the change of each query, a bar each, sorted.

    Args:
        path: where.
        titles: of each panel.
        changes: `(n_panels, n_queries) float64`.
        measure: what has changed.
    """
    changes_figure(titles, changes, measure).savefig(path, format="png", dpi=120)


def changes_figure(titles: Sequence[str], changes: np.ndarray, measure: str) -> Figure:
    """The picture that `draw_changes` writes; arguments likewise."""
    # only here: half a second to import; drawn without pyplot, which keeps every figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * len(titles)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(titles), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, title, change in zip(panels, titles, changes, strict=True):
        ordered = np.sort(change)[::-1]
        for colour, part in ((BETTER, ordered.clip(min=0)), (WORSE, ordered.clip(max=0))):
            # one outline of all bars: a patch for each takes seconds for thousands of queries
            panel.stairs(part, fill=True, color=colour)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=9, parse_math=False)
        panel.set_ylabel(f"change of {measure}")
    panels[-1].set_xlabel(f"{changes.shape[1]} queries, sorted by change")
    return figure
