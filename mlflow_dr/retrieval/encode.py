"""Encoding a token table: batches of near-equal lengths by token budget, vectors as a stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import TokenTable
from mlflow_dr.errors import CheckpointError

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


def plan_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows in batches whose padded size stays within a token budget, the longest first.

    The longest first, so that a batch that does not fit into memory fails at once.

    Args:
        lengths: tokens of each row, `(n_rows,) int64`.
        max_tokens: rows x longest row of a batch; a single row may exceed it.

    Returns:
        Row numbers of each batch, `(n_in_batch,) int64`; each row is in exactly one.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, max_tokens // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


@torch.inference_mode()
def encode_batches(
    encoder: Encoder,
    table: TokenTable,
    pad_id: int,
    max_tokens: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Vectors of the rows of a table, batch by batch.

    Args:
        encoder: on its device and in its dtype.
        table: token ids.
        pad_id: the token id of padding.
        max_tokens: token budget of a batch; chosen by device when None.
        rows: which rows, `(n_rows,) int64`; all when None.

    Yields:
        Row numbers `(n,) int64` and their vectors `(n, dim) float32` on the encoder's device.

    NaN is let through: `check_finite` is for the caller, who may gather batches first.
    """
    device = encoder.device
    budget = max_tokens or TOKENS_PER_BATCH[device.type]
    lengths = table.lengths if rows is None else table.lengths[rows]
    for places in plan_batches(lengths, budget):
        of_batch = places if rows is None else rows[places]
        ids, mask = (torch.from_numpy(array) for array in table.padded(of_batch, pad_id))
        if device.type == "cuda":
            ids, mask = ids.pin_memory(), mask.pin_memory()
        yield (
            of_batch,
            encoder(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)),
        )


def encode_all(encoder: Encoder, table: TokenTable, pad_id: int, what: str = "text") -> Tensor:
    """Vectors of every row in row order, `(n_rows, dim) float32` on the encoder's device."""
    vectors = torch.empty(len(table), encoder.dimension, device=encoder.device)
    for rows, batch in encode_batches(encoder, table, pad_id):
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
