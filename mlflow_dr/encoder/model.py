"""The encoder as a module: backbone, pooling, projections, normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.pooling import POOLING, at_least_fp32
from mlflow_dr.errors import UsageError

ACTIVATION: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}

# RoBERTa and its kin number positions from the padding token's id + 1
NUMBERED_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer")


class Encoder(nn.Module):
    """Text (as token ids) to vectors.

    Args:
        backbone: a Hugging Face model whose first output is the token vectors.
        tokenizer: the backbone's tokenizer.
        config: everything around the backbone.
        query_tower: the encoder of queries, where queries have weights of their own.

    Raises:
        UsageError: projections that do not fit, or lengths beyond the backbone's positions.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        config: EncoderConfig,
        query_tower: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = config
        _check_lengths(backbone.config, config)
        self._pool = POOLING[config.pooling]
        width = int(backbone.config.hidden_size)
        projections: list[nn.Module] = []
        self._activations = []
        for layer in config.projections:
            if layer.in_features != width:
                raise UsageError(
                    f"a projection takes {layer.in_features} dimensions, but the layer before it "
                    f"gives {width}"
                )
            projections.append(nn.Linear(width, layer.out_features, bias=layer.bias))
            self._activations.append(ACTIVATION[layer.activation]())
            width = layer.out_features
        self.projections = nn.ModuleList(projections)
        self.dimension = width
        self.query_tower = query_tower
        if query_tower is not None and query_tower.dimension != width:
            raise UsageError(
                f"queries become vectors of {query_tower.dimension} dimensions and passages of "
                f"{width}; both towers need the same"
            )

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
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        vectors = self._pool(states, attention_mask)
        for layer, activation in zip(self.projections, self._activations, strict=True):
            vectors = activation(layer(vectors.to(next(layer.parameters()).dtype)))
        vectors = at_least_fp32(vectors)
        return nn.functional.normalize(vectors, dim=-1) if self.settings.normalize else vectors

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def positions(backbone: Any) -> int | None:
    """Tokens of a text at most, by the configuration of a backbone; None where it sets no limit."""
    limit: int | None = getattr(backbone, "max_position_embeddings", None)
    if not limit or limit < 0:
        return None
    if backbone.model_type in NUMBERED_FROM_PADDING:
        limit -= backbone.pad_token_id + 1
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
