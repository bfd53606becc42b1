"""The last layer for first tokens only, where the vector of a text is that of its first token.

All tokens of a text are keys and values of the last attention, but only the first one is needed
afterwards. This serves packed texts (`packed.py`) and backbones that are built as BERT is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_dr.encoder.model import TOKENS, input_of
from mlflow_dr.encoder.varlen import PackedTexts, attend_varlen, has_varlen


def reads_first_tokens(head: Iterable[Any]) -> bool:
    """Whether a head takes the vector of the first token and looks at no other."""
    readers = [module for module in head if input_of(module) == TOKENS]
    modes = [getattr(module, "pooling_mode", None) for module in readers]
    return modes in (["cls"], [["cls"]])


def last_attention(model: Any) -> Any:
    """The attention of the last layer of a backbone that is built as BERT is; None of others."""
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    attention = getattr(layers[-1], "attention", None) if layers else None
    inner, output = getattr(attention, "self", None), getattr(attention, "output", None)
    parts = (getattr(inner, name, None) for name in ("query", "key", "value"))
    is_like_bert = all(isinstance(part, torch.nn.Linear) for part in parts)
    has_residual = hasattr(output, "dense") and hasattr(output, "LayerNorm")
    is_causal = bool(getattr(inner, "is_causal", False))
    return attention if is_like_bert and has_residual and not is_causal else None


@contextmanager
def only_first_tokens(attention: Any, texts: PackedTexts) -> Iterator[None]:
    """Let a layer give the states of first tokens only, `(1, n_texts, width)`.

    Args:
        attention: see `last_attention`.
        texts: the packed texts.
    """
    output = attention.output.forward

    def with_first_inputs(states: Tensor, inputs: Tensor) -> Tensor:
        added: Tensor = output(states, inputs[:, texts.starts])
        return added

    attention.self.forward = partial(_attend_first, attention.self, texts)
    attention.output.forward = with_first_inputs
    try:
        yield
    finally:  # the methods of their classes are found again
        del attention.self.forward, attention.output.forward


def _attend_first(
    attention: Any, texts: PackedTexts, states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """What first tokens see of their texts, `(1, n_texts, width)`, and no weights."""
    shape = (-1, attention.num_attention_heads, attention.attention_head_size)
    tokens = states[0]
    queries = attention.query(tokens[texts.starts]).view(shape)
    keys, values = attention.key(tokens).view(shape), attention.value(tokens).view(shape)
    if has_varlen(queries.device, queries.dtype):
        attended = attend_varlen(queries, keys, values, texts, attention.scaling, only_first=True)
        return attended.flatten(1)[None], None
    parts, start, text = [], 0, 0
    for length, group in groupby(texts.lengths):
        count = sum(1 for _ in group)
        stop = start + count * length
        key, value = (
            part[start:stop].unflatten(0, (count, length)).transpose(1, 2)
            for part in (keys, values)
        )
        query = queries[text : text + count, :, None]
        attended = functional.scaled_dot_product_attention(
            query, key, value, scale=attention.scaling
        )
        parts.append(attended.flatten(1))
        start, text = stop, text + count
    return torch.cat(parts)[None], None
