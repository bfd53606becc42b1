"""Dense-retrieval training with asynchronous checkpoint validation, as a plugin to MLflow.

What the command line does can be done from Python; the names below are imported when they are used.

    from mlflow_dr import EvaluateConfig, evaluate_encoder
    config = EvaluateConfig(encoder="my-encoder", dataset="irds:vaswani", measures="ndcg@10")
    report = evaluate_encoder(config)
    report.measures["ndcg@10"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_dr.version import VERSION

if TYPE_CHECKING:
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.saving import save_encoder
    from mlflow_dr.mining.mine import MiningConfig, mine
    from mlflow_dr.mining.rule import Rule
    from mlflow_dr.retrieval.vectors import open_vectors
    from mlflow_dr.training.parsing import parse_training
    from mlflow_dr.training.publish_api import (
        PublishCallback,
        flush_checkpoints,
        publish_checkpoint,
    )
    from mlflow_dr.training.train import train
    from mlflow_dr.validation.compare import compare
    from mlflow_dr.validation.config import CompareConfig, EvaluateConfig
    from mlflow_dr.validation.evaluate import evaluate_encoder
    from mlflow_dr.vectors.config import EncodeConfig, SearchConfig
    from mlflow_dr.vectors.encoding import encode
    from mlflow_dr.vectors.searching import search

__version__ = VERSION

__all__ = [
    "CompareConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "MiningConfig",
    "PublishCallback",
    "Rule",
    "SearchConfig",
    "compare",
    "encode",
    "evaluate_encoder",
    "flush_checkpoints",
    "load_encoder",
    "mine",
    "open_collection",
    "open_vectors",
    "parse_training",
    "publish_checkpoint",
    "save_encoder",
    "search",
    "train",
]

_HOMES = {
    "CompareConfig": "mlflow_dr.validation.config",
    "MiningConfig": "mlflow_dr.mining.mine",
    "EncodeConfig": "mlflow_dr.vectors.config",
    "EvaluateConfig": "mlflow_dr.validation.config",
    "PublishCallback": "mlflow_dr.training.publish_api",
    "Rule": "mlflow_dr.mining.rule",
    "SearchConfig": "mlflow_dr.vectors.config",
    "compare": "mlflow_dr.validation.compare",
    "encode": "mlflow_dr.vectors.encoding",
    "evaluate_encoder": "mlflow_dr.validation.evaluate",
    "flush_checkpoints": "mlflow_dr.training.publish_api",
    "load_encoder": "mlflow_dr.encoder.directory",
    "mine": "mlflow_dr.mining.mine",
    "open_collection": "mlflow_dr.collection.catalogue",
    "open_vectors": "mlflow_dr.retrieval.vectors",
    "parse_training": "mlflow_dr.training.parsing",
    "publish_checkpoint": "mlflow_dr.training.publish_api",
    "save_encoder": "mlflow_dr.encoder.saving",
    "search": "mlflow_dr.vectors.searching",
    "train": "mlflow_dr.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
