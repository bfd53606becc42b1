"""At which steps checkpoints are published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlflow_dr.training.arguments import TrainingRequest


@dataclass(frozen=True)
class Due:
    """Every so many steps, counted from the start or anew in each epoch.

    Attributes:
        every: steps; 0 for none.
        epoch: steps of an epoch, at whose end there is a checkpoint, too; 0 to count from the
            start.
    """

    every: int
    epoch: int = 0

    def __call__(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        counted = step % self.epoch if self.epoch else step
        return bool(self.every) and counted % self.every == 0


def due_steps(request: TrainingRequest, examples: int) -> Due:
    """When a training on so many examples publishes.

    GC-DPR's `--eval_per_epoch` evaluates every `ceil(steps of an epoch / n)` steps of an epoch, and
    at its end.
    """
    if request.publish.publish_per_epoch is None:
        return Due(request.publish.publish_steps)
    trainer = request.trainer
    batch = trainer.per_device_train_batch_size * trainer.world_size
    batches = examples // batch if trainer.dataloader_drop_last else math.ceil(examples / batch)
    epoch = max(1, math.ceil(batches / trainer.gradient_accumulation_steps))
    return Due(math.ceil(epoch / request.publish.publish_per_epoch), epoch)
