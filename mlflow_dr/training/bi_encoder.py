"""The model that is trained: one call makes vectors of queries and passages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.retrieval.encode import plan_batches

Texts = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, each `(n_texts, length)`."""

QUERY, PASSAGE = "query", "passage"

# a CPU is as fast with small batches, and they have less padding
TOKENS_PER_BATCH = 2048


class BiEncoder(nn.Module):
    """Makes vectors of queries and passages, with shared or separate weights.

    One call takes both, because DistributedDataParallel reduces gradients once per call.

    Args:
        encoder: the encoder; queries have separate weights if it has a query encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        """Role -> vectors of its texts, `(n_texts, dim)`."""
        encoders = {QUERY: self.encoder.query_encoder, PASSAGE: self.encoder}
        return {role: encode_in_batches(encoders[role], values) for role, values in texts.items()}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, not keep them. Trainer calls this."""
        for encoder in self.encoder.distinct_encoders:
            encoder.backbone.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
            )


def encode_in_batches(encoder: nn.Module, texts: Texts) -> Tensor:
    """The vectors of texts, `(n_texts, dim)`; a CPU encodes batches of texts of similar length.

    Args:
        encoder: called with `input_ids` and `attention_mask`.
        texts: texts, padded at the right.
    """
    mask = texts["attention_mask"]
    if mask.device.type != "cpu":
        return encoder(**texts)
    lengths = mask.sum(dim=1)
    total = int(lengths.sum())
    batches = plan_batches(lengths.numpy(), TOKENS_PER_BATCH)
    if len(batches) < 2 or mask.numel() <= math.ceil(1.05 * total) <= 2 * TOKENS_PER_BATCH:
        return encoder(**texts)
    order = [torch.from_numpy(rows) for rows in batches]
    vectors = [encoder(**cut(texts, rows)) for rows in order]
    return torch.cat(vectors)[inverse(order)]


def inverse(rows: Sequence[Tensor]) -> Tensor:
    """The position of each row in the concatenation of groups of rows, `(n_rows,) int64`."""
    order = torch.cat(list(rows))
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return positions


def cut(texts: Texts, rows: Tensor | slice) -> Texts:
    """Some of the texts, without columns that are padding in all of them."""
    mask = texts["attention_mask"][rows]
    longest = max(1, int(mask.sum(dim=1).max()))
    return {name: values[rows, :longest] for name, values in texts.items()}
