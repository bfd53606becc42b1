"""Dense-retrieval training with asynchronous checkpoint validation, as a plugin to MLflow.

What the command line does can be done from Python; the names below are imported when they are used.

    import mlflow_dr
    report = mlflow_dr.evaluate("my-encoder", "irds:vaswani", measures="ndcg@10")
    report.measures["ndcg@10"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_dr.version import VERSION

if TYPE_CHECKING:
    from mlflow_dr.api.functions import (
        compare,
        curve,
        encode,
        evaluate,
        fidelity,
        load_encoder,
        mine,
        run,
        search,
        train,
        validate,
    )
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.encoder.saving import save_encoder
    from mlflow_dr.retrieval.vectors import open_vectors
    from mlflow_dr.training.publish_api import (
        PublishCallback,
        flush_checkpoints,
        publish_checkpoint,
    )

__version__ = VERSION

__all__ = [
    "PublishCallback",
    "compare",
    "curve",
    "encode",
    "evaluate",
    "fidelity",
    "flush_checkpoints",
    "load_encoder",
    "mine",
    "open_collection",
    "open_vectors",
    "publish_checkpoint",
    "run",
    "save_encoder",
    "search",
    "train",
    "validate",
]

_HOMES = {
    "PublishCallback": "training.publish_api",
    "flush_checkpoints": "training.publish_api",
    "open_collection": "collection.catalogue",
    "open_vectors": "retrieval.vectors",
    "publish_checkpoint": "training.publish_api",
    "save_encoder": "encoder.saving",
}
"""The modules of the names that are not in `api.functions`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api.functions')}"), name)
