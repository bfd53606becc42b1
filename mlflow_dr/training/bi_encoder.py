"""What is trained: queries and passages to vectors in one call, with one set of weights or two."""

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

# processors lose nothing by small pieces, and less of them is padding
TOKENS_PER_PIECE = 2048


class BiEncoder(nn.Module):
    """Queries and passages to vectors.

    One forward call takes both, because DistributedDataParallel reduces gradients once per call.

    Args:
        encoder: of passages, and of queries unless it has a tower of their own.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        """Vectors of each role's texts, `(n_texts, dim)`."""
        encoders = {QUERY: self.encoder.query_encoder, PASSAGE: self.encoder}
        return {role: in_pieces(encoders[role], one) for role, one in texts.items()}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Have the backbones keep few activations and compute the rest again; Trainer calls it."""
        for encoder in self.encoder.distinct_encoders:
            encoder.backbone.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
            )


def in_pieces(encoder: nn.Module, texts: Texts) -> Tensor:
    """The vectors of texts; on a processor, encoded in pieces of near-equal length.

    Args:
        encoder: called with `input_ids` and `attention_mask`.
        texts: padded at the right.

    Returns:
        `(n_texts, dim)`, in the order of the texts.
    """
    mask = texts["attention_mask"]
    if mask.device.type != "cpu":
        return encoder(**texts)
    lengths = mask.sum(dim=1)
    total = int(lengths.sum())
    pieces = plan_batches(lengths.numpy(), TOKENS_PER_PIECE)
    if len(pieces) < 2 or mask.numel() <= math.ceil(1.05 * total) <= 2 * TOKENS_PER_PIECE:
        return encoder(**texts)
    order = [torch.from_numpy(rows) for rows in pieces]
    vectors = [encoder(**cut(texts, rows)) for rows in order]
    return torch.cat(vectors)[inverse(order)]


def inverse(rows: Sequence[Tensor]) -> Tensor:
    """Where each row number stands when groups of them are laid end to end, `(n_rows,) int64`."""
    order = torch.cat(list(rows))
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def cut(texts: Texts, rows: Tensor | slice) -> Texts:
    """Some rows, without the columns that are padding in all of them."""
    mask = texts["attention_mask"][rows]
    longest = max(1, int(mask.sum(dim=1).max()))
    return {name: values[rows, :longest] for name, values in texts.items()}
