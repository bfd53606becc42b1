"""A loss that is not a number ends training, before a checkpoint of it is published or saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from mlflow_dr.errors import TrainingError

IDS_SHOWN = 8
MOST_UNCHECKED = 1000  # losses


class LossCheck:
    """Finds a loss that is not a finite number, in any process.

    Reading a number waits for an accelerator, so there the losses are read together: when a loss is
    logged, and before a checkpoint is published or saved. On a processor each is read at once.
    All processes must make the same calls.

    Args:
        most: losses that are noted before they are checked; None for 1 on a processor and 1,000
            elsewhere.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._losses: list[Tensor] = []
        self._batches: list[tuple[int, Sequence[str]]] = []

    def note(self, loss: Tensor, step: int, query_ids: Sequence[str]) -> None:
        """Take in the loss of a batch, and check it now or later.

        Args:
            loss: `()`.
            step: the training step that the batch belongs to.
            query_ids: of the batch.

        Raises:
            TrainingError: as `check`.
        """
        self._losses.append(loss.detach())
        self._batches.append((step, query_ids[:IDS_SHOWN]))
        most = 1 if loss.device.type == "cpu" else MOST_UNCHECKED
        if len(self._losses) == (self._most or most):
            self.check()

    def check(self) -> None:
        """Check all losses since the last check; the device is asked once.

        Raises:
            TrainingError: one is not finite, here or in another process; names the first one's
                step and the queries that this process had in it.
        """
        if not self._losses:
            return
        losses, batches = torch.stack(self._losses), self._batches
        self._losses, self._batches = [], []
        is_broken = ~losses.isfinite()
        first = torch.where(is_broken.any(), is_broken.int().argmax(), len(losses))
        if distributed.is_initialized():
            distributed.all_reduce(first, distributed.ReduceOp.MIN)
        index = int(first)
        if index == len(losses):
            return
        step, query_ids = batches[index]
        raise TrainingError(
            f"the loss of step {step} is {losses[index].item()} (queries "
            f"{', '.join(map(repr, query_ids))}, ...); try a lower --learning_rate or "
            "--max_grad_norm, or bf16 instead of fp16; published checkpoints are kept"
        )
