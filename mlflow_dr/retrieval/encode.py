"""Encoding a token table: batches of near-equal lengths by token budget, vectors as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import CheckpointError
from mlflow_dr.stores.token_table import TokenTable

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


def plan_batches(
    lengths: np.ndarray, max_tokens: int, rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """Rows in batches whose padded size stays within a token budget, the longest first.

    The longest first, so that a batch that does not fit into memory fails at once. A shard i of n
    is `batches[i::n]`: a batch has the same rows in every process, so its vectors have the same
    bits, and shards take the same time.

    Args:
        lengths: tokens of each row of a table, `(n_rows,) int64`.
        max_tokens: rows x longest row of a batch; a single row may exceed it.
        rows: which rows, `(n,) int64`; all when None.

    Returns:
        Row numbers of each batch, `(n_in_batch,) int64`; each row is in exactly one.
    """
    if rows is None:
        rows = np.arange(len(lengths))
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, max_tokens // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


@torch.inference_mode()
def encode_batches(
    encoder: Encoder, table: TokenTable, pad_id: int, batches: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Vectors of the rows of a table, batch by batch.

    Args:
        encoder: on its device and in its dtype.
        table: token ids.
        pad_id: the token id of padding.
        batches: rows of each batch, `(n_in_batch,) int64`.

    Yields:
        Row numbers `(n,) int64` and their vectors `(n, dim) float32` on the encoder's device.

    NaN is let through: `check_finite` is for the caller, who may gather batches first.
    """
    device = encoder.device
    for rows in batches:
        ids, mask = (torch.from_numpy(array) for array in table.padded(rows, pad_id))
        if device.type == "cuda":
            ids, mask = ids.pin_memory(), mask.pin_memory()
        yield (
            rows,
            encoder(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)),
        )


def encode_all(encoder: Encoder, table: TokenTable, pad_id: int, what: str = "text") -> Tensor:
    """Vectors of every row in row order, `(n_rows, dim) float32` on the encoder's device."""
    vectors = torch.empty(len(table), encoder.dimension, device=encoder.device)
    batches = plan_batches(table.lengths, TOKENS_PER_BATCH[encoder.device.type])
    for rows, batch in encode_batches(encoder, table, pad_id, batches):
        vectors[torch.from_numpy(rows).to(vectors.device)] = batch
    check_finite(vectors, what)
    return vectors


def check_finite(vectors: Tensor, what: str) -> None:
    """Refuse vectors with NaN or infinity.

    Raises:
        CheckpointError: with how many of them there are.
    """
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        broken = int((~finite).sum())
        raise CheckpointError(
            f"the encoder gives NaN or infinity for {broken} of {len(vectors)} {what} vectors; "
            "the weights are broken or overflow in this dtype (try --dtype fp32)"
        )
