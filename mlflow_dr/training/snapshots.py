"""Copies of weights in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def wait_for_copies(weights: Mapping[str, Tensor]) -> None:
    """Wait until what was asked of each GPU that holds weights is done."""
    for device in {value.device for value in weights.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def host_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the weights in host memory; page-locked where they come from a GPU."""
    return {
        name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        for name, value in weights.items()
    }
