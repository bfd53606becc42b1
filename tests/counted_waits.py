"""For what of a GPU the host would wait, counted where there is none."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountedWaits(TorchDispatchMode):
    """Counts values that are asked for, and results whose number is."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "unique", "bincount", "masked_select")
    waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        name = func.overloadpacket.__name__
        of_masks = name in ("index", "index_put_") and [
            each for each in args[1] if each is not None and each.dtype == torch.bool
        ]
        # filling with one number is done without looking at the mask
        is_filling = name == "index_put_" and not args[2].dim()
        self.waits += name.startswith(self.WAITS) or (bool(of_masks) and not is_filling)
        done: torch.Tensor = func(*args, **kwargs or {})
        return done
