"""Linear layers computed by oneDNN.

PyTorch multiplies fp32 matrices by MKL, which uses AVX512 on Intel's processors only; oneDNN uses
it on all. Encoding has copies of the weights in oneDNN's own order, and an exact GELU behind a
layer is computed with it. Training takes the weights as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mlflow_dr import compat
from mlflow_dr.devices import is_onednn_faster

if TYPE_CHECKING:
    from transformers import TrainingArguments

# oneDNN keeps the kernels of 1,024 shapes, and each batch has shapes of its own; it reads this once
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


class OneDnnLayers:
    """The linear layers of a model, ready for oneDNN.

    The model's weights are copied, and must not change while this is used. Nothing has a gradient.

    Args:
        model: on a processor.
        n_rows: about how many tokens are computed at once.
    """

    def __init__(self, model: nn.Module, n_rows: int) -> None:
        fused = {id(layer): activation for layer, activation in _with_gelu(model)}
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        for layer in model.modules():
            # subclasses, such as quantised ones, compute something else
            if type(layer) is nn.Linear:
                activation = fused.get(id(layer))
                forward = compat.onednn_linear(layer, n_rows, has_gelu=activation is not None)
                self._forwards.append((layer, forward))
                if activation is not None:
                    self._forwards.append((activation, _unchanged))

    def used(self) -> AbstractContextManager[None]:
        """Compute these layers by oneDNN."""
        return _computing(self._forwards)


def trained_by_onednn(
    model: nn.Module, arguments: TrainingArguments
) -> AbstractContextManager[None]:
    """Compute linear layers in fp32 by oneDNN, where that is faster; other formats as always.

    Activations that are computed again in the backward pass need this, too, so it is meant for a
    whole training.

    Args:
        model: the model that is trained.
        arguments: say on which device, and whether torch compiles or shards the model.
    """
    is_plain = not arguments.torch_compile and not arguments.fsdp
    is_used = is_plain and is_onednn_faster(arguments.device)
    layers = [layer for layer in model.modules() if is_used and type(layer) is nn.Linear]
    return _computing([(layer, partial(_linear, layer)) for layer in layers])


@contextmanager
def _computing(forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Compute modules by other functions than the methods of their classes."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:  # the methods of their classes are found again
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    is_fp32 = inputs.dtype == layer.weight.dtype == torch.float32
    if not is_fp32 or torch.is_autocast_enabled(inputs.device.type):
        return functional.linear(inputs, layer.weight, layer.bias)
    outputs: Tensor = _Linear.apply(inputs, layer.weight, layer.bias)
    return outputs


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` by oneDNN."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return compat.onednn_product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        product = compat.onednn_product
        return (
            product(gradient, weight.T) if of_inputs else None,
            product(rows.T, inputs.flatten(0, -2).T) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _with_gelu(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Linear layers that feed an exact GELU only, as those of BERT's kin do, and the GELU."""
    for module in model.modules():
        layer: Any = getattr(module, "dense", None)
        activation: Any = getattr(module, "intermediate_act_fn", None)
        is_exact = getattr(activation, "act", None) is functional.gelu
        if type(layer) is nn.Linear and isinstance(activation, nn.Module) and is_exact:
            yield layer, activation


def _unchanged(values: Tensor) -> Tensor:
    return values
