"""The tags that show in MLflow which checkpoint is best by a validation."""

from __future__ import annotations

from collections.abc import Iterable

from mlflow.exceptions import MlflowException

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun

BEST_TAG = "mlflow_dr.best."


def set_best(run: TrackedRun, name: str, best: Checkpoint, metric: str, value: float) -> None:
    """Tag a run's best checkpoint by a validation, and the run with its name.

    Args:
        run: the run.
        name: the validation's name.
        best: its best checkpoint.
        metric: by this metric.
        value: which has this value.

    Raises:
        TrackingError: the server did not take it.
    """
    shown = f"{value:.6g}"
    with tracking_errors(f"tagging step {best.step} as best"):
        run.client.set_logged_model_tags(best.model_id, {BEST_TAG + name: shown})
    run.set_tags({BEST_TAG + name: f"step {best.step}, {best.uri}, {metric} {shown}"})


def unset_best(run: TrackedRun, name: str, checkpoints: Iterable[Checkpoint]) -> None:
    """Remove the tag from checkpoints that were best before.

    Raises:
        TrackingError: the server did not take it.
    """
    for one in checkpoints:
        with tracking_errors(f"untagging step {one.step}"):
            try:
                run.client.delete_logged_model_tag(one.model_id, BEST_TAG + name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another validator was faster
                    raise
