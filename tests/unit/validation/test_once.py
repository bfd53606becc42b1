"""One evaluation without tracking."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.checkpoints import checkpoints_of
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.once import Once, evaluate_once


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships"},
        dev={"q1": {"p0": 1}},
    )


def test_a_subset_by_a_checkpoint_of_the_server_that_is_named(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    folder: Path,
    tmp_path: Path,
) -> None:
    publishing(1)
    (checkpoint,) = checkpoints_of(run)
    request = Once(
        str(tmp_path / "step-1"),
        str(folder),
        "dev",
        device="cpu",
        subset=f"encoder:{checkpoint.uri}@2",
        tracking_uri=client.tracking_uri,
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/another.db")
    try:
        assert evaluate_once(request).passages in (2, 3)
    finally:
        mlflow.set_tracking_uri(before)
