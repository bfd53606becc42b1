"""A study of fidelity from beginning to end: find the checkpoints, study them, log and write."""

from __future__ import annotations

from mlflow_dr.fidelity_study.agreement import FidelityResult
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fidelity_study.report import write_files
from mlflow_dr.fidelity_study.study import study_fidelity
from mlflow_dr.files import scratch
from mlflow_dr.tracking.artifacts import FIDELITY_FOLDER, log_study
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.following import found_checkpoints
from mlflow_dr.tracking.runs import resolve_run


def fidelity(config: FidelityConfig) -> FidelityResult:
    """Find the subset of the corpus that chooses the right checkpoint in the least time.

    The report is written to the folder of the configuration, and logged to the run.

    Raises:
        UsageError: neither a run nor a directory is named, or as `study_fidelity`.
        DataError: the collection's files are damaged.
        TrackingError: no such run, or no server.
    """
    config.check_source()
    client = connect(config.tracking_uri, may_create=False) if config.run_id else None
    run = resolve_run(client, config.run_id) if client and config.run_id else None
    if config.checkpoints_dir is not None:
        checkpoints = found_checkpoints(config.checkpoints_dir)
    else:
        checkpoints = (
            [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready] if run else []
        )
    result = study_fidelity(checkpoints, config, run)
    if config.output is not None:
        write_files(result, config.output)
    if run is not None and not config.no_log:
        with scratch() as directory:
            log_study(run, write_files(result, directory), FIDELITY_FOLDER)
    return result
