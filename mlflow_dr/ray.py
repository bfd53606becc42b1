"""Validation for trainings by Ray Train: a function for its `ValidationConfig`.

    trainer = TorchTrainer(
        train_loop,
        validation_config=ValidationConfig(
            fn=mlflow_dr.ray.validation_fn,
            task_config=ValidationTaskConfig(fn_kwargs={"dataset": "msmarco", "dtype": "bf16"}),
            ray_remote_kwargs={"num_gpus": 1},
        ),
    )

Ray Train calls it after `ray.train.report(..., checkpoint=..., validation=True)`, and reports what
it returns. See https://docs.ray.io/en/latest/train/user-guides/asynchronous-validation.html.
"""

from __future__ import annotations

from typing import Any


def validation_fn(checkpoint: Any, **settings: Any) -> dict[str, float]:
    """Measure the encoder in a checkpoint of Ray Train.

    Args:
        checkpoint: a `ray.train.Checkpoint`, whose directory has an encoder, as
            sentence-transformers or `save_encoder` writes it.
        settings: the fields of `mlflow-dr evaluate`: at least `dataset`; `measures`, `subset`,
            `engine` and so on.

    Returns:
        The measures, named as MLflow allows, such as `mrr_at_10`, the ends of their intervals with
        `estimate`, and `seconds`.

    Raises:
        UsageError: settings that make no sense together, or an unknown dataset.
        CheckpointError: no encoder can be read from the directory, or it gives NaN.
    """
    from mlflow_dr.validation.evaluate import evaluate_encoder
    from mlflow_dr.validation.evaluate_config import EvaluateConfig
    from mlflow_dr.validation.report import metric_values

    with checkpoint.as_directory() as directory:
        report = evaluate_encoder(EvaluateConfig(encoder=str(directory), **settings))
    return {**metric_values(report), "seconds": report.seconds}
