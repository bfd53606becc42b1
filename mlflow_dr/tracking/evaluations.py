"""What `mlflow.models.evaluate` wants of an evaluator: its base class, and results of its kind.

`ModelEvaluator` is passed on from here because MLflow is imported in this package alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric
from mlflow.models.evaluation.base import EvaluationArtifact, EvaluationResult, ModelEvaluator
from mlflow.tracking.artifact_utils import get_artifact_uri

from mlflow_dr import compat
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.datasets import CollectionDataset

__all__ = [
    "EvaluationResult",
    "ModelEvaluator",
    "evaluation_result",
    "log_dataset",
    "log_evaluation_metrics",
]

TABLE = "eval_results_table"
RANKING = "ranking"


def log_dataset(run_id: str, dataset: CollectionDataset) -> None:
    """Show a collection among a run's inputs.

    Raises:
        TrackingError: the server did not take it.
    """
    with tracking_errors(f"logging the collection of run {run_id}"):
        MlflowClient().log_inputs(run_id, [DatasetInput(compat.dataset_entity(dataset), [])])


def log_evaluation_metrics(
    run_id: str, values: Mapping[str, float], dataset: CollectionDataset
) -> None:
    """Log an evaluation's figures to a run alone.

    Raises:
        TrackingError: the server did not take them.
    """
    now = time.time_ns() // 1_000_000
    metrics = [
        Metric(
            key,
            value,
            now,
            0,
            dataset_name=dataset.name,
            dataset_digest=dataset.digest,
            run_id=run_id,
        )
        for key, value in values.items()
    ]
    with tracking_errors(f"logging the figures of run {run_id}"):
        MlflowClient().log_batch(run_id, metrics=metrics)


def evaluation_result(
    run_id: str,
    values: Mapping[str, float],
    table: Mapping[str, Sequence[Any]],
    prefix: str = "",
    ranking: str | None = None,
) -> EvaluationResult:
    """Log the artifacts of an evaluation; returns what `mlflow.models.evaluate` gives its caller.

    Args:
        run_id: they go to this run.
        values: figures by metric name, prefix included.
        table: columns by name, a row for each query.
        prefix: put before the names of metrics and artifacts.
        ranking: the text of a TREC run file, if it is to be kept.

    Raises:
        TrackingError: the server did not take them.
    """
    # imported here, because it imports matplotlib
    from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact, TextEvaluationArtifact

    rows = [list(row) for row in zip(*table.values(), strict=True)]
    name = f"{prefix}{TABLE}.json"
    with tracking_errors(f"logging the evaluation of run {run_id}"):
        mlflow.log_table(dict(table), name, run_id=run_id)
        content = {"columns": list(table), "data": rows}
        uri = get_artifact_uri(run_id, name)
        artifacts: dict[str, EvaluationArtifact] = {TABLE: JsonEvaluationArtifact(uri, content)}
        if ranking is not None:
            file = f"{prefix}{RANKING}.trec"
            MlflowClient().log_text(run_id, ranking, file)
            uri = get_artifact_uri(run_id, file)
            artifacts[RANKING] = TextEvaluationArtifact(uri, ranking)
    return EvaluationResult(dict(values), artifacts, run_id)
