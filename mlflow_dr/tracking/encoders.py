"""Any encoder by one name: a directory, a hub name, or `models:/...` of a published checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_dr.errors import (
    CheckpointError,
    MissingExtraError,
    MlflowDrError,
    UnavailableError,
    causes,
    one_line,
)
from mlflow_dr.files import is_full

if TYPE_CHECKING:  # an encoder of another kind needs no mlflow, which takes seconds to import
    from mlflow_dr.tracking.checkpoints import Checkpoint

MODEL_SCHEME = "models:/"
# what a machine lacks, or a network; a file that is missing or no file is the checkpoint's
LOCAL_ERRORS = {
    *(errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.ETIMEDOUT),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE),
}
NETWORK_LIBRARIES = {"requests", "urllib3", "httpx", "httpcore"}
HUB = "huggingface_hub"  # whose other errors are of malformed configurations
ABOUT_FILES = (CheckpointError, MissingExtraError)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUDA error")


@contextmanager
def local_encoder(name: str, tracking_uri: str | None = None) -> Iterator[str]:
    """What `load_encoder` takes for this name; a checkpoint is fetched and verified first.

    Args:
        name: a directory, a hub name, or what `checkpoint_by_uri` takes.
        tracking_uri: where `models:/` is looked up; the environment's server when None.

    Raises:
        UsageError: a registered model's version that is no checkpoint.
        TrackingError: no such model, or no server.
        CheckpointError: the checkpoint cannot be had, or its bytes are not those published.
    """
    with encoder_location(resolve_encoder(name, tracking_uri)) as found:
        yield found


def resolve_encoder(name: str, tracking_uri: str | None = None) -> Checkpoint | str:
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
def encoder_location(source: Checkpoint | str) -> Iterator[str]:
    """What `load_encoder` takes for a name, or a checkpoint's directory, as long as it is used.

    Raises:
        CheckpointError: the checkpoint cannot be had, or its bytes are not those published.
    """
    if isinstance(source, str):
        yield source
        return
    from mlflow_dr.tracking.fetching import checkpoint_files

    with checkpoint_files(source) as directory:
        yield str(directory)


@contextmanager
def encoder_errors(what: str) -> Iterator[None]:
    """Make one line of whatever goes wrong between an encoder's files and its first vector.

    The files are somebody else's, and the libraries that read them raise errors of all kinds.

    Args:
        what: is read, for the message.

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
            raise  # a name that nothing goes by, say
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
    """What of an error and its causes is the fault of this machine, or of the network."""
    return next((one for one in causes(error) if _is_local(one)), None)


def _is_local(error: BaseException) -> bool:
    if isinstance(error, MemoryError | ImportError | MissingExtraError | ConnectionError):
        return True
    library = type(error).__module__.partition(".")[0]
    if library in NETWORK_LIBRARIES or (library == HUB and isinstance(error, OSError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in LOCAL_ERRORS or is_full(error, Path())
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
