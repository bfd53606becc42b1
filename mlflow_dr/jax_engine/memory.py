"""The memory of a step on each device, and which chunk of the gradient cache would fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mlflow_dr.errors import TrainingError
from mlflow_dr.jax_engine.devices import compiled, is_out_of_memory, memory_limit
from mlflow_dr.jax_engine.step import IDS, Batch, Step
from mlflow_dr.training.batches import PASSAGE, QUERY

log = logging.getLogger(__name__)

GIGABYTE = 1e9
MOST_TRIES = 8
ASKED = re.compile(r"(?:allocat\w+|[Uu]sed|require\w*)\s+([\d.]+\s*(?:bytes|[KMGT]i?B?))")
"""How XLA's messages say how much memory was asked for."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step uses on each device.

    Attributes:
        weights: weights and AdamW's moments.
        gradients: the gradient of the weights.
        batch: token ids and masks.
        temporary: activations, and whatever else lives only while the step is computed.
    """

    weights: int
    gradients: int
    batch: int
    temporary: int

    @classmethod
    def of(cls, function: Any, trained: Mapping[str, Any]) -> StepMemory:
        """The memory of a compiled gradient.

        Args:
            function: what was compiled.
            trained: the weights that are trained.
        """
        found = function.memory_analysis()
        own = sum(weight.size * weight.dtype.itemsize for weight in trained.values())
        summed = found.alias_size_in_bytes  # the sum so far becomes the new one
        arguments = found.argument_size_in_bytes - summed
        return cls(
            weights=3 * own,
            gradients=found.output_size_in_bytes,
            batch=max(0, arguments - own),
            temporary=found.temp_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.batch + self.temporary

    def fits(self, device: Any) -> bool:
        """Whether a device has that much memory, as far as is known."""
        limit = memory_limit(device)
        return limit is None or self.total <= limit


def larger_than_memory(
    step: Step,
    trained: Any,
    frozen: Any,
    batch: Batch,
    memory: StepMemory | None = None,
    error: BaseException | None = None,
) -> TrainingError:
    """The error for a step that needs more memory than a device has.

    Args:
        step: the step.
        trained: its weights that are trained.
        frozen: its other weights.
        batch: the batch.
        memory: what the step needs, if it could be compiled.
        error: what XLA says otherwise.
    """
    device = step.mesh.devices.flat[0]
    limit = memory_limit(device)
    asked = f"{memory.total / GIGABYTE:.2f} GB" if memory else asked_for(error)
    has = f", which has {limit / GIGABYTE:.2f} GB" if limit else ""
    size = chunk_that_fits(step, trained, frozen, batch)
    hint = (
        f"--grad_cache --gc_q_chunk_size {size} --gc_p_chunk_size {size} would fit"
        if size
        else "no --gc_p_chunk_size would fit; use --bf16, --gradient_checkpointing, a smaller "
        "--per_device_train_batch_size or a smaller model"
    )
    return TrainingError(f"a step asks for {asked} of memory on each device{has}; {hint}")


def asked_for(error: BaseException | None) -> str:
    """How much memory XLA's message says was asked for."""
    found = ASKED.search(str(error))
    return found[1] if found else "more"


def chunk_that_fits(step: Step, trained: Any, frozen: Any, batch: Batch) -> int | None:
    """The largest chunk of the gradient cache, of halved sizes, with which a step fits.

    Args:
        step: the step, which does not fit as it is.
        trained: its weights that are trained, or their shapes.
        frozen: its other weights, or their shapes.
        batch: the batch, or its shapes.

    Returns:
        Texts in a chunk; None if not even the last size that is tried fits.
    """
    devices = step.mesh.devices.size
    sizes = step.config.chunk_sizes
    size = sizes[PASSAGE] if sizes else batch[IDS.format(PASSAGE)].shape[0] // devices
    for _ in range(MOST_TRIES):
        size //= 2
        if size < 1:
            break
        log.info("trying chunks of %d texts", size)
        smaller = step.with_chunks({QUERY: size, PASSAGE: size})
        try:
            lowered = smaller.lower_gradient(trained, frozen, batch)
            memory = StepMemory.of(compiled(lowered, f"the step for chunks of {size}"), trained)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        if memory.fits(step.mesh.devices.flat[0]):
            return size
    return None
