"""A study of fidelity on the run whose checkpoints it is about."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlflow.entities import Metric

from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun

FOLDER = "fidelity"


def log_study(run: TrackedRun, metrics: Mapping[str, float], files: Iterable[Path]) -> None:
    """Log a study's figures, and its files into the folder `fidelity`; later ones replace them.

    Raises:
        TrackingError: the server did not take it.
    """
    now_ms = time.time_ns() // 1_000_000
    logged = [Metric(key, float(value), now_ms, 0) for key, value in metrics.items()]
    with tracking_errors(f"keeping the study of fidelity with run {run.id}"):
        run.client.log_batch(run.id, metrics=logged)
        for file in files:
            run.client.log_artifact(run.id, str(file), FOLDER)
