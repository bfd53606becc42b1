"""What the checkpoints of a training will take on disk, said before its first step."""

from __future__ import annotations

import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.files import nearest_existing
from mlflow_dr.terminal import byte_count
from mlflow_dr.tracking.fetching import local_directory
from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

MOMENTS = 2  # Adam's, in fp32, beside the weights of a checkpoint to resume from
BYTES_OF_MOMENT = 4


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, in all processes together if they are sharded."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Planned(NamedTuple):
    """Checkpoints that a training will write: how many, bytes of each, and where.

    `directory` is None for a store that is not on this machine.
    """

    verb: str
    number: int
    bytes_each: int
    directory: Path | None

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.number * self.bytes_each


class DiskUse(TrainerCallback):
    """Logs what the checkpoints will take, and warns if there is less room.

    Args:
        run: that gets the published checkpoints.
        published_bytes: of a checkpoint that is published.
        schedule: after which steps one is published, beside the last.
        initial: whether the weights before the first step are published, too.
    """

    def __init__(
        self,
        run: TrackedRun,
        published_bytes: int,
        schedule: Callable[[int], bool],
        initial: bool,
    ) -> None:
        location = str(run.seen.info.artifact_uri or "").removesuffix(f"/{run.id}/artifacts")
        self._store = local_directory(location)
        self._published_bytes = published_bytes
        self._schedule = schedule
        self._initial = initial

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Say it, now that Trainer knows the number of steps."""
        steps = range(state.global_step + 1, state.max_steps + 1)
        count = sum(map(self._schedule, steps)) + (self._initial and not state.global_step)
        count += bool(steps) and not self._schedule(state.max_steps)
        published = Planned("published", int(count), self._published_bytes, self._store)
        plans = [published, *self._saved(args, state, given.get("model"))]
        for plan in plans:
            log.info("%s", _sentence(plan))
        _warn_if_short(plans)

    def _saved(self, args: Any, state: TrainerState, model: Any) -> list[Planned]:
        """The checkpoints to resume from, none if the training saves none."""
        if args.save_strategy == SaveStrategy.NO or model is None:
            return []
        left = state.max_steps - state.global_step
        if args.save_strategy == SaveStrategy.EPOCH:
            count = math.ceil(args.num_train_epochs * left / max(1, state.max_steps))
        else:
            count = math.ceil(left / max(1, state.save_steps or args.save_steps))
        if args.save_total_limit:
            count = min(count, args.save_total_limit)
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        size = bytes_of(model.parameters()) + MOMENTS * BYTES_OF_MOMENT * trained
        return [Planned("saved to resume from", count, size, Path(str(args.output_dir)))]


def _sentence(plan: Planned) -> str:
    noun = "checkpoint" if plan.number == 1 else "checkpoints"
    each = "" if plan.number == 1 else f" of {byte_count(plan.bytes_each)} each"
    text = f"{plan.number} {noun}{each} will be {plan.verb}: {byte_count(plan.bytes)}"
    if plan.directory is None:
        return text
    return f"{text} in {plan.directory}, where {byte_count(_free(plan.directory))} are free"


def _warn_if_short(plans: Iterable[Planned]) -> None:
    """Warn about each disk that has less room than all of its checkpoints need."""
    needed: defaultdict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for plan in plans:
        if plan.directory is not None:
            device = nearest_existing(plan.directory).stat().st_dev
            needed[device] += plan.bytes
            folders.setdefault(device, plan.directory)
    for device, folder in folders.items():
        if needed[device] > _free(folder):
            log.warning(
                "checkpoints need %s on the disk of %s, which has %s: publish less often "
                "(--publish_steps), set --save_total_limit, or let a validator remove files "
                "(`mlflow-dr validate --keep best:3,last:2`)",
                byte_count(needed[device]),
                folder,
                byte_count(_free(folder)),
            )


def _free(folder: Path) -> int:
    return shutil.disk_usage(nearest_existing(folder)).free
