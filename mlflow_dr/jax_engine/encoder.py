"""The encoder as a pure function in JAX, over the names and layouts of torch's weights.

A linear layer is `x @ W.T + b`, so the weights of a checkpoint are used as they are. The backbones
are those of transformers' `BertModel`, `RobertaModel`, `XLMRobertaModel` and `DistilBertModel`; the
head is that of `mlflow_dr.encoder.model`. Shapes: `batch` texts of `length` tokens, `width` numbers
for each token, `dim` numbers for each text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from torch import nn

from mlflow_dr.encoder.model import SENTENCE, TOKENS, Encoder, input_of, is_adapted, output_of
from mlflow_dr.errors import UsageError

Weights = Mapping[str, Array]
"""name in `Encoder.state_dict()` -> weight"""

Encode = Callable[[Weights, Array, Array, Array | None], Array]
"""Weights, ids `(batch, length) int32`, mask `(batch, length) int32` with 1 for a token, and a key
for dropout (None without dropout) -> vectors `(batch, dim)`, at least fp32."""

FIRST_LAYER = 1 << 16
"""Layers draw from this number on, and what is outside of them from numbers below."""

Features = dict[str, Array]
Activation = Callable[[Array], Array]


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _identity(x: Array) -> Array:
    return x


# transformers' names
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": _gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), jax.nn.gelu),
    "relu": jax.nn.relu,
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "tanh": jnp.tanh,
}
# torch's modules
PROJECTION_ACTIVATIONS: Mapping[type[nn.Module], Activation] = {
    nn.Identity: _identity,
    nn.Tanh: jnp.tanh,
    nn.ReLU: jax.nn.relu,
    nn.SiLU: jax.nn.silu,
    nn.Sigmoid: jax.nn.sigmoid,
}


@dataclass(frozen=True)
class LayerNames:
    """What a kind of backbone calls the parts of a layer."""

    layer: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    inner: str
    outer: str
    norm: str


BERT = LayerNames(
    "encoder.layer",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
DISTILBERT = LayerNames(
    "transformer.layer",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
NAMES = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "distilbert": DISTILBERT}
"""transformers' `model_type` -> the names of its layers."""


@dataclass
class _Dropout:
    """Dropout with a key of its own at each call; nothing without a key."""

    key: Array | None
    calls: int = field(default=0)

    def __call__(self, x: Array, probability: float) -> Array:
        self.calls += 1
        if self.key is None or probability == 0:
            return x
        key = jax.random.fold_in(self.key, self.calls)
        kept = jax.random.bernoulli(key, 1 - probability, x.shape)
        return jnp.where(kept, x / (1 - probability), 0).astype(x.dtype)


@dataclass(frozen=True)
class JaxBackbone:
    """Settings of a backbone that its weights do not show.

    Attributes:
        prefix: of the names of its weights.
        names: what its layers are called.
        n_layers: number of layers.
        n_heads: attention heads of a layer.
        epsilon: of its layer norms.
        activation: between the two linear layers.
        hidden_dropout: probability for hidden states.
        attention_dropout: probability for attention weights.
        pad_id: the token whose vector gets no gradient; None for no token.
        counts_tokens: whether positions count tokens, from `pad_id + 1` on, as in RoBERTa.
        recompute: whether the backward pass computes the inside of each layer again.
    """

    prefix: str
    names: LayerNames
    n_layers: int
    n_heads: int
    epsilon: float
    activation: Activation
    hidden_dropout: float
    attention_dropout: float
    pad_id: int | None
    counts_tokens: bool
    recompute: bool

    def __call__(
        self, weights: Weights, ids: Array, mask: Array, dropout: _Dropout, dtype: Any
    ) -> Array:
        """Token vectors `(batch, length, width)` in `dtype`."""
        x = dropout(self._embedded(weights, ids).astype(dtype), self.hidden_dropout)
        for number in range(self.n_layers):
            own = f"{self.prefix}{self.names.layer}.{number}."
            layer_weights = {k: v for k, v in weights.items() if k.startswith(own)}
            key = (
                None
                if dropout.key is None
                else jax.random.fold_in(dropout.key, FIRST_LAYER + number)
            )

            def layer(layer_weights: Weights, x: Array, key: Array | None, own: str = own) -> Array:
                return self._layer(layer_weights, own, x, mask, _Dropout(key))

            x = (jax.checkpoint(layer) if self.recompute else layer)(layer_weights, x, key)
        return x

    def _embedded(self, weights: Weights, ids: Array) -> Array:
        """Token, type and position embeddings, summed and normalised."""

        def table(name: str) -> Array:
            return weights[f"{self.prefix}embeddings.{name}_embeddings.weight"]

        tokens = table("word")[ids]
        if self.pad_id is not None:
            is_padding = (ids == self.pad_id)[:, :, None]
            tokens = jnp.where(is_padding, jax.lax.stop_gradient(tokens), tokens)
        if self.counts_tokens and self.pad_id is not None:
            is_token = (ids != self.pad_id).astype(ids.dtype)
            numbers = jnp.cumsum(is_token, axis=1) * is_token + self.pad_id
            place = jnp.where(is_padding, jax.lax.stop_gradient(table("position")[numbers]), 0)
            tokens = tokens + jnp.where(is_padding, place, table("position")[numbers])
        else:
            tokens = tokens + table("position")[: ids.shape[1]]
        if self.names is BERT:
            tokens = tokens + table("token_type")[0]
        return _norm(weights, f"{self.prefix}embeddings.LayerNorm", tokens, self.epsilon)

    def _layer(self, weights: Weights, own: str, x: Array, mask: Array, dropout: _Dropout) -> Array:
        """One layer: attention and feed-forward, each added to its input and normalised."""
        names = self.names
        attended = self._attention(weights, own, x, mask, dropout)
        if names is BERT:
            attended = dropout(attended, self.hidden_dropout)
        x = _norm(weights, own + names.attention_norm, attended + x, self.epsilon)
        inner = self.activation(_linear(weights, own + names.inner, x))
        outer = dropout(_linear(weights, own + names.outer, inner), self.hidden_dropout)
        return _norm(weights, own + names.norm, outer + x, self.epsilon)

    def _attention(
        self, weights: Weights, own: str, x: Array, mask: Array, dropout: _Dropout
    ) -> Array:
        batch, length, width = x.shape
        shape = (batch, length, self.n_heads, width // self.n_heads)
        query, key, value = (
            _linear(weights, own + name, x).reshape(shape)
            for name in (self.names.query, self.names.key, self.names.value)
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
        scores = scores / np.sqrt(shape[-1]).astype(wide)
        # the smallest number and not minus infinity, which would give NaN for a text without tokens
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(wide).min)
        attention = dropout(jax.nn.softmax(scores, axis=-1).astype(x.dtype), self.attention_dropout)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        return _linear(weights, own + self.names.attention_output, mixed.reshape(x.shape))


def _linear(weights: Weights, name: str, x: Array) -> Array:
    """`x @ W.T + b` in the format of `x`."""
    out = x @ weights[f"{name}.weight"].astype(x.dtype).T
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias.astype(x.dtype)


def _norm(weights: Weights, name: str, x: Array, epsilon: float) -> Array:
    """Layer norm, computed at least in fp32; the result has the format of `x`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axis=-1, keepdims=True)
    centred = wide - mean
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    return (normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]).astype(x.dtype)


def encode_functions(
    encoder: Encoder, dtype: Any = None, recompute: bool = False
) -> tuple[Encode, Encode]:
    """The functions that make vectors of queries and of passages; they may be the same one.

    Args:
        encoder: gives the settings; its weights are read by `weights_of`.
        dtype: number format of the backbone; that of the weights when None. Layer norms, attention
            weights, pooling and the layers after it are at least in fp32.
        recompute: whether the backward pass computes the inside of each layer again.

    Raises:
        UsageError: the encoder has a part that is not written in JAX; the message lists what is.
    """
    passages = _encode_function(encoder, "", dtype, recompute)
    if encoder.untied_query_encoder is None:
        return passages, passages
    query_encoder = encoder.untied_query_encoder
    return _encode_function(query_encoder, "untied_query_encoder.", dtype, recompute), passages


def weights_of(encoder: Encoder) -> dict[str, np.ndarray]:
    """The weights of an encoder by name; they share the memory of the encoder's."""
    return {name: weight.detach().numpy() for name, weight in encoder.state_dict().items()}


def _encode_function(encoder: Encoder, prefix: str, dtype: Any, recompute: bool) -> Encode:
    backbone = _backbone(encoder, f"{prefix}backbone.", recompute)
    head = [
        _head_module(module, f"{prefix}head.{index}") for index, module in enumerate(encoder.head)
    ]
    probe = f"{prefix}backbone.embeddings.word_embeddings.weight"

    def encode(weights: Weights, ids: Array, mask: Array, key: Array | None) -> Array:
        dropout = _Dropout(key)
        tokens = backbone(weights, ids, mask, dropout, dtype or weights[probe].dtype)
        features = {TOKENS: tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))}
        for apply in head:
            apply(weights, features, mask, dropout)
        return features[SENTENCE]

    return encode


def _backbone(encoder: Encoder, prefix: str, recompute: bool) -> JaxBackbone:
    """The settings of an encoder's backbone.

    Raises:
        UsageError: JAX has no such backbone.
    """
    expected = f"--engine jax has backbones of {', '.join(NAMES)} only; use --engine torch"
    if encoder.is_static:
        raise UsageError(f"the encoder is a table of token vectors; {expected}")
    if is_adapted(encoder.backbone):
        raise UsageError("--engine jax does not train adapters; merge them or use --engine torch")
    config = encoder.backbone.config
    kind = str(config.model_type)
    if kind not in NAMES:
        raise UsageError(f"the encoder's model_type is {kind}; {expected}")
    is_distilbert = NAMES[kind] is DISTILBERT
    activation = config.activation if is_distilbert else config.hidden_act
    if activation not in ACTIVATIONS or getattr(config, "is_decoder", False):
        what = "is_decoder" if getattr(config, "is_decoder", False) else f"activation {activation}"
        raise UsageError(
            f"the backbone's configuration has {what}, which --engine jax does not have (known "
            f"activations: {', '.join(ACTIVATIONS)}); use --engine torch"
        )
    return JaxBackbone(
        prefix=prefix,
        names=NAMES[kind],
        n_layers=int(config.num_hidden_layers),
        n_heads=int(config.num_attention_heads),
        epsilon=1e-12 if is_distilbert else float(config.layer_norm_eps),
        activation=ACTIVATIONS[activation],
        hidden_dropout=config.dropout if is_distilbert else config.hidden_dropout_prob,
        attention_dropout=(
            config.attention_dropout if is_distilbert else config.attention_probs_dropout_prob
        ),
        pad_id=config.pad_token_id,
        counts_tokens=kind in ("roberta", "xlm-roberta"),
        recompute=recompute,
    )


def _head_module(module: Any, name: str) -> Callable[[Weights, Features, Array, _Dropout], None]:
    """What a module of the head does to the features of a batch.

    Args:
        module: the module in torch.
        name: the prefix of its weights.

    Raises:
        UsageError: it is not written in JAX.
    """
    kind = type(module).__name__
    reads, writes = input_of(module), output_of(module)
    if kind == "Pooling":
        modes = (
            (module.pooling_mode,) if isinstance(module.pooling_mode, str) else module.pooling_mode
        )

        def pool(weights: Weights, features: Features, mask: Array, dropout: _Dropout) -> None:
            parts = [POOLINGS[mode](features[TOKENS], mask) for mode in modes]
            features[SENTENCE] = jnp.concatenate(parts, axis=-1)

        return pool
    if kind == "Dense":
        return _projection(module, name, reads, writes)
    operations: dict[str, Callable[[Weights, Array, _Dropout], Array]] = {
        "Normalize": lambda weights, x, dropout: unit_vectors(x),
        "LayerNorm": lambda weights, x, dropout: _norm(weights, f"{name}.norm", x, module.norm.eps),
        "Dropout": lambda weights, x, dropout: dropout(x, module.dropout),
    }

    def apply(weights: Weights, features: Features, mask: Array, dropout: _Dropout) -> None:
        features[writes] = operations[kind](weights, features[reads], dropout)

    return apply


def _projection(
    module: Any, name: str, reads: str, writes: str
) -> Callable[[Weights, Features, Array, _Dropout], None]:
    """A linear layer after the pooling or before it, with its activation."""
    activation = PROJECTION_ACTIVATIONS.get(type(module.activation_function))
    if activation is None or getattr(module, "use_residual", False):
        known = ", ".join(kind.__name__ for kind in PROJECTION_ACTIVATIONS)
        raise UsageError(
            f"the encoder's projection {name} has a residual connection or an activation that "
            f"--engine jax does not have (known: {known}); use --engine torch"
        )

    def project(weights: Weights, features: Features, mask: Array, dropout: _Dropout) -> None:
        features[writes] = activation(_linear(weights, f"{name}.linear", features[reads]))

    return project


def unit_vectors(x: Array) -> Array:
    """Vectors of length 1; a vector of zeros stays, and has no gradient."""
    squares = (x * x).sum(axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return x / jnp.maximum(jnp.where(squares > 0, length, 0), 1e-12)


def _cls(tokens: Array, mask: Array) -> Array:
    return tokens[:, 0]


def _last(tokens: Array, mask: Array) -> Array:
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]


def _max(tokens: Array, mask: Array) -> Array:
    return jnp.where(mask[:, :, None] > 0, tokens, -jnp.inf).max(axis=1)


def _weighted(tokens: Array, weights: Array, power: float = 1.0) -> Array:
    """The sum of token vectors times their weights, divided by a power of the sum of weights."""
    weights = weights.astype(tokens.dtype)[:, :, None]
    total = jnp.maximum(weights.sum(axis=1), 1e-9)
    return (tokens * weights).sum(axis=1) / total**power


def _weighted_mean(tokens: Array, mask: Array) -> Array:
    return _weighted(tokens, mask * jnp.arange(1, mask.shape[1] + 1))


POOLINGS: Mapping[str, Callable[[Array, Array], Array]] = {
    "cls": _cls,
    "mean": _weighted,
    "lasttoken": _last,
    "max": _max,
    "mean_sqrt_len_tokens": lambda tokens, mask: _weighted(tokens, mask, 0.5),
    "weightedmean": _weighted_mean,
}
"""sentence-transformers' name of a pooling -> token vectors and mask -> one vector a text."""
