"""Any encoder by one name: a directory, a hub name, or `models:/...` of a published checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr.errors import (
    CheckpointError,
    MissingExtraError,
    MlflowDrError,
    UnavailableError,
    causes,
    one_line,
)
from mlflow_dr.files import is_full

if TYPE_CHECKING:  # importing mlflow takes seconds, and other encoders do not need it
    from mlflow_dr.encoder.model import Encoder
    from mlflow_dr.tracking.checkpoints import Checkpoint
    from mlflow_dr.tracking.runs import TrackedRun

MODEL_SCHEME = "models:/"
# faults of the machine or the network; a missing file is the checkpoint's fault
LOCAL_ERRORS = {
    *(errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.ETIMEDOUT),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE),
}
NETWORK_LIBRARIES = {"requests", "urllib3", "httpx", "httpcore"}
HUB = "huggingface_hub"  # its other errors come from malformed configurations
ABOUT_FILES = (CheckpointError, MissingExtraError)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUDA error")


def open_encoder(
    source: Checkpoint | str,
    tracking_uri: str | None = None,
    label: str | None = None,
    **options: Any,
) -> Encoder:
    """The encoder of a checkpoint or a name, on the processor in fp32.

    Args:
        source: as `local_encoder` takes it.
        tracking_uri: the server of `models:/`; the environment's when None.
        label: what errors name; the name or URI of the source when None.
        options: of `load_encoder`.

    Raises:
        UsageError: no encoder has this name.
        TrackingError: no such model, or no server.
        UnavailableError: it cannot be read on this machine.
        CheckpointError: it cannot be read anywhere.
    """
    from mlflow_dr.encoder.directory import load_encoder  # imports torch

    label = label or (source if isinstance(source, str) else source.uri)
    with local_encoder(source, tracking_uri) as directory, encoder_errors(label):
        return load_encoder(directory, **options)


@contextmanager
def local_encoder(source: Checkpoint | str, tracking_uri: str | None = None) -> Iterator[str]:
    """The name of an encoder as `load_encoder` takes it, valid inside the `with` block.

    A checkpoint is downloaded and verified first.

    Args:
        source: a checkpoint, a directory, a hub name, or what `checkpoint_by_uri` takes.
        tracking_uri: the server of `models:/`; the environment's when None.

    Raises:
        UsageError: the version of a registered model is not a checkpoint.
        TrackingError: no such model, or no server.
        CheckpointError: the checkpoint cannot be fetched, or its bytes are not those published.
    """
    encoder = resolve_encoder(source, tracking_uri) if isinstance(source, str) else source
    if isinstance(encoder, str):
        yield encoder
        return
    from mlflow_dr.tracking.fetching import checkpoint_files

    with checkpoint_files(encoder) as directory:
        yield str(directory)


def resolve_encoder(name: str, tracking_uri: str | None = None) -> Checkpoint | str:
    """The checkpoint of a name `models:/...`; every other name is returned as it is.

    Raises:
        UsageError: the version of a registered model is not a checkpoint.
        TrackingError: no such model, or no server.
    """
    if not name.startswith(MODEL_SCHEME):
        return name
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.registry import checkpoint_by_uri

    return checkpoint_by_uri(connect(tracking_uri, may_create=False), name)


def checkpoint_and_run(name: str, tracking_uri: str | None = None) -> tuple[Checkpoint, TrackedRun]:
    """The checkpoint of a name `models:/...`, and its run.

    Raises:
        UsageError: the version of a registered model is not a checkpoint.
        TrackingError: no such model or run, or no server.
    """
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.registry import checkpoint_by_uri
    from mlflow_dr.tracking.runs import find_run

    client = connect(tracking_uri, may_create=False)
    checkpoint = checkpoint_by_uri(client, name)
    return checkpoint, find_run(client, checkpoint.run_id)


@contextmanager
def encoder_errors(what: str) -> Iterator[None]:
    """Turn every error between an encoder's files and its first vector into one line.

    The files may come from anywhere, and the libraries that read them raise errors of all kinds.

    Args:
        what: the encoder's name, for the message.

    Raises:
        UnavailableError: this machine lacks memory, a module, a right or the network.
        CheckpointError: anything else is the files' fault.
        OSError: the disk is full.
        MlflowDrError: as it was raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MlflowDrError) and not isinstance(error, ABOUT_FILES):
            raise  # such as an unknown name
        local = local_cause(error)
        if isinstance(local, OSError) and is_full(local, Path()):
            raise local from error
        if local is not None:
            reason = str(local) if isinstance(local, MlflowDrError) else one_line(local)
            lasting = isinstance(local, ImportError | MissingExtraError)
            raise UnavailableError(f"{what} cannot be read here: {reason}", lasting) from error
        if isinstance(error, MlflowDrError):
            raise
        raise CheckpointError(f"{what} cannot be read: {one_line(error)}") from error


def local_cause(error: BaseException) -> BaseException | None:
    """The first error in a chain of causes that is due to this machine or the network."""
    return next((cause for cause in causes(error) if _is_local(cause)), None)


def _is_local(error: BaseException) -> bool:
    if isinstance(error, MemoryError | ImportError | MissingExtraError | ConnectionError):
        return True
    library = type(error).__module__.partition(".")[0]
    if library in NETWORK_LIBRARIES or (library == HUB and isinstance(error, OSError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in LOCAL_ERRORS or is_full(error, Path())
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
