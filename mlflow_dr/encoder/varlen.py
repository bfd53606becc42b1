"""Texts that lie end to end, and CUDA's attention for texts of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.devices import on_device


@dataclass(frozen=True)
class PackedTexts:
    """Where each text begins and ends, among texts that lie end to end.

    Only the ends are copied to the device, and everything else is computed there.

    Attributes:
        ends: 0 and the end of each text, `(n_texts + 1,) int32`, on the device.
        n_tokens: tokens of all texts.
        longest: tokens of the longest text, or more.
        lengths: tokens of each text; texts of equal length are beside each other. A kernel for
            texts of several lengths does not need them.
    """

    ends: Tensor
    n_tokens: int
    longest: int
    lengths: Sequence[int] = ()

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedTexts:
        """Texts of these lengths; their ends are copied to a device."""
        return cls(on_device(ends_of(lengths), device), sum(lengths), max(lengths), lengths)

    @property
    def starts(self) -> Tensor:
        """The first token of each text, `(n_texts,) int32`, on the device.

        Of an empty text at the end, the last token of all.
        """
        return self.ends[:-1].clamp(max=self.n_tokens - 1)

    @property
    def positions(self) -> Tensor:
        """The position of each token in its text, `(n_tokens,) int64`."""
        starts = self.starts.repeat_interleave(self.ends.diff(), output_size=self.n_tokens)
        return torch.arange(self.n_tokens, device=starts.device) - starts

    def side_by_side(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of tokens `(n_tokens, ...)` as `(n_texts, longest, ...)`.

        Also returns which of them are tokens of the text, `(n_texts, longest) bool`; the rest are
        values of arbitrary tokens.
        """
        places = self.starts[:, None] + torch.arange(self.longest, device=self.ends.device)
        return values[places.clamp(max=self.n_tokens - 1)], places < self.ends[1:, None]


def ends_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0 and the end of each of several texts that lie end to end, `(n_texts + 1,) int32`."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a kernel for attention of texts of several lengths, in a format."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: PackedTexts,
    scaling: float | None,
    window: tuple[int, int] = (-1, -1),
    only_first: bool = False,
) -> Tensor:
    """Attention within texts; nothing is asked of the device.

    Args:
        query: `(n_tokens, n_heads, dim)`, fp16 or bf16; `(n_texts, n_heads, dim)` with
            `only_first`.
        key: `(n_tokens, n_key_heads, dim)`.
        value: as `key`.
        texts: which tokens are of which text.
        scaling: of the products; `dim ** -0.5` when None.
        window: how many tokens before and after its own a token sees; -1 for all.
        only_first: whether there is one query for each text, its first token.

    Returns:
        As `query`.
    """
    from torch.nn.attention.varlen import varlen_attn

    longest, ends = texts.longest, texts.ends
    of_queries = (
        torch.arange(len(ends), dtype=ends.dtype, device=ends.device) if only_first else ends
    )
    attended: Any = varlen_attn(
        query,
        key,
        value,
        of_queries,
        ends,
        1 if only_first else longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out: Tensor = attended
    return out
