"""MLflow's figures of the machine (processor, memory, disk, network, GPUs) on our runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)


@contextmanager
def system_metrics(run: TrackedRun) -> Iterator[None]:
    """Log the machine's figures as `system/...` meanwhile, where the user has MLflow do so.

    MLflow does it for its active run, which ours never is. Its settings hold:
    `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING` or `mlflow.enable_system_metrics_logging()`, and those of
    the interval, the samples and the node. On a run that has such figures the steps go on.
    """
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = None
    try:
        monitor = SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=tracking_uri())
        monitor.start()
    except Exception as error:  # noqa: BLE001 - as MLflow: training goes on without
        log.warning("the machine's figures are not logged: %s", error)
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()
