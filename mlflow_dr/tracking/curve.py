"""The curve of a validation: its figures by training step, and what it says in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlflow_dr.tracking.checkpoints import checkpoints_of
from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import figures_of


class Point(NamedTuple):
    """The figures of one checkpoint."""

    step: int
    model_id: str
    values: Mapping[str, float]


def curve_of(run: TrackedRun, name: str) -> list[Point]:
    """The recorded figures of a validation, by step."""
    return [
        Point(one.step, one.model_id, figures)
        for one in checkpoints_of(run)
        if (figures := figures_of(one, name))
    ]


def summary(points: Sequence[Point], metrics: Sequence[str], run_id: str) -> str:
    """First, last and best checkpoint, and how to open the UI.

    Args:
        points: a validation's curve.
        metrics: metric names without prefix; the first one decides which checkpoint is best.
        run_id: shown.
    """
    lines = ["", f"run {run_id}: {len(points)} checkpoints validated"]
    if points:
        best = max(points, key=lambda point: point.values[metrics[0]])
        for what, point in (("first", points[0]), ("last", points[-1]), ("best", best)):
            figures = "  ".join(f"{name} {point.values[name]:.4f}" for name in metrics)
            lines.append(f"  {what:5}  step {point.step:<7} {figures}")
        lines.append(f"best checkpoint by {metrics[0]}: models:/{best.model_id}")
    uri = tracking_uri()
    if uri.startswith("http"):
        lines.append(f"curves: {uri}")
    else:
        lines.append(f"curves: mlflow server --backend-store-uri {uri} --port 5000")
    return "\n".join(lines)
