"""Linear layers computed by oneDNN, with weights in its own order.

PyTorch multiplies fp32 matrices by MKL, which uses AVX512 on Intel's processors only; oneDNN uses
it on all. An exact GELU behind a layer is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mlflow_dr import compat


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

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute these layers by oneDNN."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            yield
        finally:  # the methods of their classes are found again
            for layer, _ in self._forwards:
                layer.__dict__.pop("forward", None)


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
