"""Runs that publish."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.tracking.checkpoints import publish
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def publishing(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path, folder: Path
) -> Callable[[int], str]:
    """Publishes an encoder of other weights for each step of a run that trains on `folder`."""
    run.log_params({"dataset": str(folder), "validation_split": "dev"})

    def publish_step(step: int) -> str:
        directory = tmp_path / f"step-{step}"
        save_encoder(directory, make_tiny(seed=step, pooling="mean", normalize=True))
        return publish(run, directory, step)

    return publish_step
