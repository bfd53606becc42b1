"""Any encoder by one name: a directory, a hub name, or `models:/...` of a published checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MODEL_SCHEME = "models:/"


@contextmanager
def fetched_encoder(name: str, tracking_uri: str | None = None) -> Iterator[str]:
    """What `load_encoder` takes for this name; a checkpoint is fetched and verified first.

    Args:
        name: a directory, a hub name, or what `checkpoint_by_uri` takes.
        tracking_uri: where `models:/` is looked up; the environment's server when None.

    Raises:
        UsageError: a registered model's version that is no checkpoint.
        TrackingError: no such model, or no server.
        CheckpointError: the checkpoint cannot be had, or its bytes are not those published.
    """
    if not name.startswith(MODEL_SCHEME):
        yield name
        return
    # only here: an encoder of another kind needs no mlflow, which takes seconds to import
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.fetching import fetched
    from mlflow_dr.tracking.registry import checkpoint_by_uri

    with fetched(checkpoint_by_uri(connect(tracking_uri), name)) as directory:
        yield str(directory)
