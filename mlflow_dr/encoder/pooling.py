"""From token vectors to one vector per text.

Shapes: `states` is `(batch, length, width)`, `mask` is `(batch, length)` with 1 for a token and 0
for padding at the right; the result is `(batch, width)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cls(states: Tensor, mask: Tensor) -> Tensor:
    """The first token's vector (BERT's [CLS])."""
    return states[:, 0]


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens; padding does not count. Sums in fp32."""
    summed, count = _sum(states, mask)
    return summed / count


def mean_sqrt_len(states: Tensor, mask: Tensor) -> Tensor:
    """The sum over tokens divided by the square root of their number."""
    summed, count = _sum(states, mask)
    return summed / count.sqrt()


def last(states: Tensor, mask: Tensor) -> Tensor:
    """The last token's vector, for backbones that look only to the left."""
    positions = mask.sum(dim=1).clamp(min=1) - 1
    return states[torch.arange(len(states), device=states.device), positions]


def maximum(states: Tensor, mask: Tensor) -> Tensor:
    """The largest value in each dimension over tokens."""
    return states.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)


def weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean with weights 1, 2, 3, ... by position (SGPT, Muennighoff 2022)."""
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    summed, count = _sum(states, weights)
    return summed / count


def _sum(states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    states = at_least_fp32(states)
    weights = weights.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)


def at_least_fp32(values: Tensor) -> Tensor:
    """Half-precision numbers as fp32; others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": cls,
    "mean": mean,
    "last": last,
    "max": maximum,
    "mean_sqrt_len": mean_sqrt_len,
    "weighted_mean": weighted_mean,
}
