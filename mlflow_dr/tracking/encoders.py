"""Any encoder by one name: a directory, a hub name, or `models:/...` of a published checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an encoder of another kind needs no mlflow, which takes seconds to import
    from mlflow_dr.tracking.checkpoints import Checkpoint

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
    with encoder_files(looked_up(name, tracking_uri)) as found:
        yield found


def looked_up(name: str, tracking_uri: str | None = None) -> Checkpoint | str:
    """The checkpoint behind `models:/...`; any other name as it is.

    Raises:
        UsageError: a registered model's version that is no checkpoint.
        TrackingError: no such model, or no server.
    """
    if not name.startswith(MODEL_SCHEME):
        return name
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.registry import checkpoint_by_uri

    return checkpoint_by_uri(connect(tracking_uri, may_create=False), name)


@contextmanager
def encoder_files(source: Checkpoint | str) -> Iterator[str]:
    """What `load_encoder` takes for a name, or a checkpoint's directory, as long as it is used.

    Raises:
        CheckpointError: the checkpoint cannot be had, or its bytes are not those published.
    """
    if isinstance(source, str):
        yield source
        return
    from mlflow_dr.tracking.fetching import fetched

    with fetched(source) as directory:
        yield str(directory)
