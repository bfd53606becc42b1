"""What MLflow notes on our runs about the command and the machine.

MLflow imports this module whenever it is imported itself, so nothing heavy is behind it.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_dr.version import VERSION

if TYPE_CHECKING:
    from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

COMMAND_VARIABLE = "MLFLOW_DR_COMMAND"
COMMAND_LINE_VARIABLE = "MLFLOW_DR_COMMAND_LINE"  # as the user typed it, also in child processes
COMMAND_LINE_TAG = "mlflow_dr.command_line"
PACKAGES = ("torch", "transformers")


class DenseRetrievalRunContext(RunContextProvider):
    """Version, command, host and library versions, on runs that our command line makes."""

    def in_context(self) -> bool:
        """Whether this process is one of our commands."""
        return COMMAND_VARIABLE in os.environ

    def tags(self) -> dict[str, str]:
        """The tags."""
        tags = {
            "mlflow_dr.version": VERSION,
            "mlflow_dr.command": os.environ[COMMAND_VARIABLE],
            "mlflow_dr.host": platform.node(),
            "mlflow_dr.cores": str(os.cpu_count()),
        }
        if line := os.environ.get(COMMAND_LINE_VARIABLE):
            tags[COMMAND_LINE_TAG] = line
        for package in PACKAGES:
            try:
                tags[f"mlflow_dr.{package}"] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return tags


@contextmanager
def system_metrics(run: TrackedRun) -> Iterator[None]:
    """Log the machine's figures as `system/...` in the block, unless MLflow is set not to.

    MLflow does it only for its active run, and our run never is one. MLflow's settings apply:
    `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false` or `mlflow.disable_system_metrics_logging()`, and
    those of the interval, the samples and the node. If the run already has such figures, their
    steps continue.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    variable = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if variable.is_set() and not variable.get():
        yield
        return
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it says when it begins
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    from mlflow_dr.tracking.client import tracking_uri

    monitor = None
    try:
        monitor = SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=tracking_uri())
        monitor.start()
    except Exception as error:  # noqa: BLE001 - as in MLflow, training continues without them
        log.warning("the machine's figures are not logged: %s", error)
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()
