"""What each worker of an engine runs, in whichever process: it has an encoder, and does shards."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from mlflow_dr.cache import unchanged_cache
from mlflow_dr.devices import torch_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import Work
from mlflow_dr.errors import one_line
from mlflow_dr.stores.token_table import TableReference, TokenTable

SavedEncoder = Path | np.ndarray
"""A file, or the bytes of one."""


class Answer(NamedTuple):
    """What a worker answers to a request: a value, or the error that was raised."""

    value: Any = None
    error: Exception | None = None


def write_encoder(encoder: Encoder, dtype: str, file: IO[bytes]) -> None:
    """Write an encoder, so that a worker can load it.

    Args:
        encoder: is moved to the processor, and into the number format.
        dtype: `fp32`, `bf16` or `fp16`.
        file: is written.
    """
    torch.save(encoder.eval().to("cpu", torch_dtype(dtype)), file)


class ShardWorker:
    """An encoder on a device, a token table, and work to do on its shards.

    Args:
        device: where the encoder runs.
        threads: of the processor.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        # arrays that several processes share cannot be written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._device = device
        self._encoder: Encoder | None = None
        self._work: Work[Any] | None = None
        self._table: TokenTable | None = None
        self._opened: dict[str, TokenTable | None] = {}

    def answer(self, request: str, *arguments: Any) -> Answer:
        """Call one of the methods below; errors become answers."""
        try:
            return Answer(getattr(self, request)(*arguments))
        except Exception as error:  # noqa: BLE001
            return Answer(error=_portable(error))

    def load(self, saved: SavedEncoder) -> None:
        """Load an encoder instead of the one before; a file is mapped, and shared by workers."""
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()  # where the code of an encoder with code of its own is
        self._encoder = None  # before the next one takes memory
        if isinstance(saved, Path):
            encoder = torch.load(saved, "cpu", mmap=True, weights_only=False)
        else:
            encoder = torch.load(io.BytesIO(saved.data), "cpu", weights_only=False)
        self._encoder = encoder.eval().to(self._device)

    def begin(self, shared: tuple[Work[Any], TableReference | None]) -> bool:
        """Note what is done with the next shards.

        Args:
            shared: the work, and how the token table of the shards is opened.

        Returns:
            Whether that token table is here.
        """
        self._work, reference = shared
        self._table = None
        if reference is not None:
            self._table = self._open(reference)
        return self._table is not None

    def do(self, batches: Sequence[np.ndarray], tokens: TokenTable | None) -> Any:
        """Do the work on a shard.

        Args:
            batches: the shard.
            tokens: its tokens, if the token table is not here.
        """
        table = tokens or self._table
        assert self._encoder is not None and self._work is not None and table is not None
        with unchanged_cache():
            return self._work(self._encoder, table, batches)

    def _open(self, reference: TableReference) -> TokenTable | None:
        if reference.entry not in self._opened:
            self._opened = {reference.entry: reference._replace(rows=None).open()}
        table = self._opened[reference.entry]
        if table is None or reference.rows is None:
            return table
        return table.spread(reference.rows, reference.n_texts)


def _portable(error: Exception) -> Exception:
    """The error itself, or one with its text if another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(one_line(error))
    return error
