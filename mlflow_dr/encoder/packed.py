"""Token vectors of texts that lie end to end, without padding and without a mask.

A backbone that takes its attention from transformers' `AttentionInterface` calls `attend`, which
keeps each text to itself. Texts of equal length are computed together. On CUDA, half-precision
numbers go through the kernel for texts of several lengths.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_dr import compat
from mlflow_dr.encoder.first_token import last_attention, only_first_tokens, reads_first_tokens
from mlflow_dr.encoder.graphs import BackboneGraphs
from mlflow_dr.encoder.model import TOKENS, Encoder, apply_head, first_position, is_adapted
from mlflow_dr.encoder.varlen import PackedTexts, attend_varlen, has_varlen

ATTENTION = "mlflow_dr_packed"
"""The name of `attend` in transformers."""
# these change the attention, and `attend` does not compute them
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
LONGEST_OF_EXPONENTIALS = 512  # tokens; the attention weights of longer texts fill the memory
SAFE_SUMS = 1e-30, 1e30
"""Row sums of exponentials with which nothing overflows or vanishes in bf16."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed_texts: PackedTexts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each text; transformers calls it in each layer.

    Args:
        module: the layer's attention.
        query: `(1, n_heads, n_tokens, dim)`.
        key: `(1, n_key_heads, n_tokens, dim)`.
        value: as `key`.
        attention_mask: None.
        dropout: the share of weights that are dropped.
        scaling: of the products; `dim ** -0.5` when None.
        sliding_window: tokens that are as far apart as this, or further, do not see each other.
        is_causal: whether a token sees only those before it; the module's own when None.
        packed_texts: which tokens are of which text.
        options: others of transformers.

    Returns:
        `(1, n_tokens, n_heads, dim)`, and no weights.

    Raises:
        NotImplementedError: this attention cannot be computed so.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if packed_texts is None or attention_mask is not None or asked or len(query) != 1:
        raise NotImplementedError(f"attention of packed texts with {asked or 'a mask'}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    settings = _Attention(scaling, causal, sliding_window, dropout)
    if has_varlen(query.device, query.dtype) and not dropout:
        return _attend_varlen(query, key, value, packed_texts, settings)[None], None
    parts, start = [], 0
    for length, texts in groupby(packed_texts.lengths):
        count = sum(1 for _ in texts)
        stop = start + count * length
        of_query, of_key, of_value = (
            states[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1)
            for states in (query, key, value)
        )
        parts.append(_attend_equal(of_query, of_key, of_value, settings))
        start = stop
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


class _Attention(NamedTuple):
    """What is computed; see `attend`."""

    scaling: float | None
    is_causal: bool
    window: int | None
    dropout: float


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, settings: _Attention) -> Tensor:
    """Attention within texts of one length.

    Args:
        query: `(n_texts, n_heads, length, dim)`.
        key: `(n_texts, n_key_heads, length, dim)`.
        value: as `key`.
        settings: what is computed.

    Returns:
        `(n_texts * length, n_heads, dim)`.
    """
    length, causal, mask = query.shape[2], settings.is_causal, None
    if _suits_exponentials(query, key, settings):
        attended = _attend_by_exponentials(query, key, value, settings.scaling)
        if attended is not None:
            return attended
    if settings.window is not None and settings.window < length:
        places = torch.arange(length, device=query.device)
        distance = places[:, None] - places
        mask = distance.abs() < settings.window
        mask, causal = mask & (distance >= 0) if causal else mask, False
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=settings.dropout,
        is_causal=causal,
        scale=settings.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)


def _suits_exponentials(query: Tensor, key: Tensor, settings: _Attention) -> bool:
    """Whether attention is faster by exponentials: in bf16 on a processor, without gradients."""
    length = query.shape[2]
    is_plain = not settings.is_causal and not settings.dropout and query.shape == key.shape
    sees_all = settings.window is None or settings.window >= length
    fits = query.device.type == "cpu" and query.dtype == torch.bfloat16
    is_short = length <= LONGEST_OF_EXPONENTIALS
    return fits and is_plain and sees_all and is_short and not torch.is_grad_enabled()


def _attend_by_exponentials(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor | None:
    """Attention by a softmax that does not take the greatest product off, see `_attend_equal`.

    A column of ones beside the values gives the sum of the exponentials. None where a sum is so
    large or so small that numbers may have been lost.
    """
    n_texts, n_heads, length, dim = query.shape
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    weights = torch.matmul(scaled, key.transpose(2, 3)).exp_()
    summed = torch.matmul(weights, functional.pad(value, (0, 1), value=1.0))
    sums = summed[..., dim:]
    smallest, largest = SAFE_SUMS
    if bool(((sums < smallest) | (sums > largest)).any()):  # NaN stays NaN
        return None
    attended = query.new_empty(n_texts, length, n_heads, dim)
    torch.div(summed[..., :dim].transpose(1, 2), sums.transpose(1, 2), out=attended)
    return attended.flatten(0, 1)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, texts: PackedTexts, settings: _Attention
) -> Tensor:
    """Attention within texts of several lengths; arguments as `attend`, result without its 1."""
    reach = -1 if settings.window is None else settings.window - 1
    window = reach, 0 if settings.is_causal else reach
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend_varlen(query, key, value, texts, settings.scaling, window)


def can_pack(encoder: Encoder) -> bool:
    """Whether packed texts are worth a try: a transformer that takes position numbers.

    An encoder with a `forward` of its own computes more than backbone and head.
    """
    has_own_forward = type(encoder).forward is not Encoder.forward
    if encoder.is_static or has_own_forward or not hasattr(encoder.backbone, "config"):
        return False
    return "position_ids" in inspect.signature(_model(encoder).forward).parameters


def encode_packed(
    encoder: Encoder, ids: Tensor, texts: PackedTexts, graphs: BackboneGraphs | None = None
) -> Tensor:
    """Vectors of texts that lie end to end.

    Args:
        encoder: in evaluation mode; `can_pack` holds.
        ids: token ids of all texts, `(n_tokens,) int64`, on the encoder's device.
        texts: which tokens are of which text.
        graphs: record what the backbone computes, and replay it.

    Returns:
        `(n_texts, dimension) float32`; see `Encoder.forward`.
    """
    compat.register_attention(ATTENTION, attend)
    model = _model(encoder)
    last = last_attention(model) if reads_first_tokens(encoder.head) else None
    compute = partial(_states, encoder.backbone, model.config, last)
    states = compute(ids, texts) if graphs is None else graphs.states(compute, ids, texts)
    if last is None:  # the head ignores what is beyond the end of a text
        states, mask = texts.side_by_side(states)
    else:
        mask = torch.ones_like(texts.starts)[:, None]
        states = states[: len(mask), None]  # a graph may have more texts
    features = {TOKENS: states, "attention_mask": mask.long()}
    return apply_head(encoder.head, features)


def _states(backbone: Any, config: Any, last: Any, ids: Tensor, texts: PackedTexts) -> Tensor:
    """Token vectors `(n_tokens, width)`; of first tokens only, if there is a last attention."""
    options = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    only_first = nullcontext() if last is None else only_first_tokens(last, texts)
    with compat.attention_set(config, ATTENTION), only_first:
        states: Tensor = backbone(
            input_ids=ids[None],
            position_ids=(texts.positions + first_position(backbone))[None],
            packed_texts=texts,
            **options,
        )[0][0]
    return states


def _model(encoder: Encoder) -> Any:
    """The backbone below its adapters."""
    backbone = encoder.backbone
    return backbone.get_base_model() if is_adapted(backbone) else backbone
