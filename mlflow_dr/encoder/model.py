"""The encoder as a module: a backbone, and the head that makes one vector of its token vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.head import (
    SENTENCE,
    TOKENS,
    apply_head,
    is_normalized,
    pooling_name,
    projections_of,
    standard_head,
    vector_dimension,
)
from mlflow_dr.errors import UsageError


class Encoder(nn.Module):
    """Text (as token ids) to vectors.

    Args:
        backbone: a Hugging Face model whose first output is the token vectors, or the library's
            `StaticEmbedding`, which gives the mean of its tokens' vectors.
        tokenizer: the backbone's tokenizer.
        config: everything around the backbone.
        query_tower: the encoder of queries, where queries have weights of their own.
        head: sentence-transformers' modules after the backbone, in the place of those that
            `config` describes; pooling, projections and normalisation of `settings` are then
            theirs.

    Raises:
        UsageError: modules that do not fit, or lengths beyond the backbone's positions.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        config: EncoderConfig,
        query_tower: Encoder | None = None,
        head: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.is_static = is_static(backbone)
        _check_lengths(backbone, config)
        modules = standard_head(config, self.width) if head is None else list(head)
        self.settings = replace(
            config,
            pooling=pooling_name(modules) or config.pooling,
            normalize=is_normalized(modules),
            projections=projections_of(modules),
        )
        self.head = nn.ModuleList(modules)
        start = SENTENCE if self.is_static else TOKENS
        self.dimension = vector_dimension(modules, self.width, start)
        self.query_tower = query_tower
        if query_tower is not None and query_tower.dimension != self.dimension:
            raise UsageError(
                f"queries become vectors of {query_tower.dimension} dimensions and passages of "
                f"{self.dimension}; both towers need the same"
            )

    @property
    def width(self) -> int:
        """Dimensions of what the backbone gives."""
        if self.is_static:
            return int(self.backbone.embedding_dim)
        return int(self.backbone.config.hidden_size)

    @property
    def for_queries(self) -> Encoder:
        """What encodes queries: a tower of their own, or this one."""
        return self if self.query_tower is None else self.query_tower

    @property
    def towers(self) -> tuple[Encoder, ...]:
        """This encoder, and the queries' where they have one of their own."""
        return (self,) if self.query_tower is None else (self, self.query_tower)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors of the texts.

        Args:
            input_ids: `(batch, length) int64`, padded at the right.
            attention_mask: `(batch, length) int64`, 1 for tokens.

        Returns:
            `(batch, dimension) float32`, normalised in fp32 when the configuration says so; fp64
            for an encoder in fp64.
        """
        features: dict[str, Any] = {"attention_mask": attention_mask}
        if self.is_static:
            lengths = attention_mask.sum(dim=1)
            flat = {
                "input_ids": input_ids[attention_mask.bool()],
                "offsets": torch.cumsum(lengths, 0) - lengths,
            }
            features[SENTENCE] = self.backbone(flat)[SENTENCE]
        else:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
            features[TOKENS] = states
        return apply_head(self.head, features)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def is_static(backbone: Any) -> bool:
    """Whether a backbone is the library's table of token vectors instead of a transformer."""
    return type(backbone).__name__ == "StaticEmbedding"


def positions(backbone: Any) -> int | None:
    """Tokens of a text at most, by a backbone's table of positions; None where it sets no limit."""
    limit: int | None = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    if not limit or limit < 0:
        return None
    for module in backbone.modules():
        # RoBERTa, MPNet, data2vec and their kin number positions from the padding token's id + 1
        table = getattr(module, "position_embeddings", None)
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            return limit - padding - 1
    return limit


def _check_lengths(backbone: Any, config: EncoderConfig) -> None:
    """Refuse texts longer than the backbone has positions for."""
    limit = positions(backbone)
    if limit is None:
        return
    for side in ("query", "passage"):
        length = getattr(config, f"{side}_max_length")
        if length > limit:
            raise UsageError(
                f"{side}_max_length is {length}, but the backbone has {limit} positions; "
                "use shorter texts or another backbone"
            )
