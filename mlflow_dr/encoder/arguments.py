"""An encoder as an argument of a function: its name, a published checkpoint, or a loaded one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from mlflow_dr.files import PathLike, scratch

if TYPE_CHECKING:
    from mlflow_dr.encoder.saving import LoadedEncoder


class PublishedCheckpoint(Protocol):
    """A checkpoint, such as `curve.best`."""

    @property
    def uri(self) -> str:
        """Its name, `models:/<id>`."""


AnyEncoder: TypeAlias = "PathLike | PublishedCheckpoint | LoadedEncoder"
"""A directory, a hub name, `models:/...`, a checkpoint such as `curve.best`, or an encoder of
`load_encoder` or of sentence-transformers, which is copied into a temporary directory."""


def encoder_name(encoder: AnyEncoder) -> str | None:
    """The name of an encoder; None for one that is loaded."""
    if isinstance(encoder, str | os.PathLike):
        return os.fspath(encoder)
    uri = getattr(encoder, "uri", None)
    return uri if isinstance(uri, str) else None


@contextmanager
def named_encoder(encoder: AnyEncoder) -> Iterator[str]:
    """The name of an encoder, valid inside the `with` block.

    An encoder that is loaded is written into a temporary directory, so that nothing changes it.

    Raises:
        UsageError: it is no encoder.
    """
    if (name := encoder_name(encoder)) is not None:
        yield name
        return
    from mlflow_dr.encoder.saving import save_loaded_encoder  # imports torch

    with scratch() as folder:
        directory = folder / "loaded"  # a run is called after it
        save_loaded_encoder(directory, cast("LoadedEncoder", encoder))
        yield str(directory)


def named_or_none(encoder: AnyEncoder | None) -> AbstractContextManager[str | None]:
    """As `named_encoder`; None stays None."""
    return nullcontext() if encoder is None else named_encoder(encoder)
