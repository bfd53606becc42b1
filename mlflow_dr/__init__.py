"""Dense-retrieval training with asynchronous checkpoint validation, as a plugin to MLflow.

What the command line does can be done from Python; the names below are imported when they are used.

    from mlflow_dr import Once, evaluate_once
    report = evaluate_once(Once("my-encoder", dataset="irds:vaswani", measures="ndcg@10"))
    report.measures["ndcg@10"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_dr.version import VERSION

if TYPE_CHECKING:
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.encoder.directory import load_encoder, save_encoder
    from mlflow_dr.mining.mine import MiningConfig, mine
    from mlflow_dr.mining.rule import Rule
    from mlflow_dr.training.parsing import parse_training
    from mlflow_dr.training.publish_api import (
        PublishCallback,
        flush_checkpoints,
        publish_checkpoint,
    )
    from mlflow_dr.training.train import train
    from mlflow_dr.validation.compare import Comparing, compare
    from mlflow_dr.validation.once import Once, evaluate_once

__version__ = VERSION

__all__ = [
    "Comparing",
    "MiningConfig",
    "Once",
    "PublishCallback",
    "Rule",
    "compare",
    "evaluate_once",
    "flush_checkpoints",
    "load_encoder",
    "mine",
    "open_collection",
    "parse_training",
    "publish_checkpoint",
    "save_encoder",
    "train",
]

_HOMES = {
    "Comparing": "mlflow_dr.validation.compare",
    "MiningConfig": "mlflow_dr.mining.mine",
    "Once": "mlflow_dr.validation.once",
    "PublishCallback": "mlflow_dr.training.publish_api",
    "Rule": "mlflow_dr.mining.rule",
    "compare": "mlflow_dr.validation.compare",
    "evaluate_once": "mlflow_dr.validation.once",
    "flush_checkpoints": "mlflow_dr.training.publish_api",
    "load_encoder": "mlflow_dr.encoder.directory",
    "mine": "mlflow_dr.mining.mine",
    "open_collection": "mlflow_dr.collection.catalogue",
    "parse_training": "mlflow_dr.training.parsing",
    "publish_checkpoint": "mlflow_dr.training.publish_api",
    "save_encoder": "mlflow_dr.encoder.directory",
    "train": "mlflow_dr.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
