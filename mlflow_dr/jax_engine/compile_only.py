"""`--compile-only`: whether a step fits into the memory of TPUs that this machine does not have.

libtpu compiles for a description of TPUs. Nothing is run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import MissingExtraError, UsageError, one_line
from mlflow_dr.jax_engine.batch import padded_length
from mlflow_dr.jax_engine.devices import (
    compiled,
    is_out_of_memory,
    memory_limit,
    mesh_of,
)
from mlflow_dr.jax_engine.encoder import weights_of
from mlflow_dr.jax_engine.memory import GIGABYTE, StepMemory, larger_than_memory
from mlflow_dr.jax_engine.step import IDS, IS_REAL, KEYS, MASK, TEACHER, Step, StepConfig
from mlflow_dr.tracking.encoders import local_encoder
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.batches import PASSAGE, QUERY
from mlflow_dr.training.data import open_data
from mlflow_dr.training.encoder_setup import build_encoder

# libtpu asks the network which TPU a machine has, and writes to stderr that it has none
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
NO_LIBRARY = "TPU support not installed"


def compile_for(request: TrainingRequest) -> str:
    """Compile a step of a training for the TPUs that `--compile-only` names.

    Returns:
        What it needs, as lines of text.

    Raises:
        UsageError: there are no such TPUs, or the encoder is not written in JAX.
        MissingExtraError: libtpu is not installed.
        TrainingError: the step does not fit; the message has a size of chunks that does.
    """
    name = str(request.engine.compile_only)
    devices = tpu_devices(name)
    encoder = _encoder(request)
    step = Step(
        encoder,
        StepConfig.of(request.trainer, request.loss.objective(encoder), request.loss.chunk_sizes()),
        mesh_of(devices),
        dict.fromkeys(weights_of(encoder), 0.0),
    )
    trained, frozen = _weight_shapes(encoder, step)
    batch = batch_shapes(request, encoder, step)
    began = time.perf_counter()
    lowered = step.lower_gradient(trained, frozen, batch)
    try:
        memory = StepMemory.of(compiled(lowered, f"the step for {name}"), trained)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise larger_than_memory(step, trained, frozen, batch, None, error) from error
    compiled(step.lower_update(trained), "AdamW's step")
    if not memory.fits(devices[0]):
        raise larger_than_memory(step, trained, frozen, batch, memory)
    return _report(name, devices, batch, memory, time.perf_counter() - began)


def tpu_devices(name: str) -> list[Any]:
    """Descriptions of TPUs, such as `v5e:2x4`.

    Raises:
        MissingExtraError: libtpu is not installed.
        UsageError: libtpu does not know the name.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # this process uses no TPU
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        if NO_LIBRARY in str(error):
            raise MissingExtraError(
                "--compile-only needs libtpu: pip install libtpu, or name its file by "
                f"TPU_LIBRARY_PATH ({one_line(error)})"
            ) from error
        raise UsageError(
            f"--compile-only {name}: libtpu knows no such TPUs; expected a name such as v5e:2x4, "
            f"v4:2x2x1 or v6e:2x2 ({one_line(error)})"
        ) from error


def _encoder(request: TrainingRequest) -> Encoder:
    """The encoder of a request; its weights are only counted."""
    with local_encoder(request.model.model_name_or_path, request.publish.tracking_uri) as start:
        return build_encoder(request, open_data(request.data, request.trainer.seed), start)


def _weight_shapes(encoder: Encoder, step: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of the weights that are trained, and of the others."""
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    shapes = {
        name: jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=step.everywhere)
        for name, weight in weights_of(encoder).items()
    }
    return (
        {name: shape for name, shape in shapes.items() if name in trained},
        {name: shape for name, shape in shapes.items() if name not in trained},
    )


def batch_shapes(request: TrainingRequest, encoder: Encoder, step: Step) -> dict[str, Any]:
    """The shapes of a batch with the longest passages, on all devices together."""
    n_queries = request.trainer.per_device_train_batch_size * int(step.mesh.devices.size)
    group = request.data.train_n_passages + request.data.other_negatives
    longest = encoder.settings.passage_max_length
    lengths = {
        QUERY: encoder.query_encoder.settings.query_max_length,
        PASSAGE: padded_length(longest, longest),
    }
    rows = {QUERY: n_queries, PASSAGE: n_queries * group}

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=step.split)

    batch = {
        name.format(role): shape(np.int32, rows[role], lengths[role])
        for role in rows
        for name in (IDS, MASK)
    }
    batch[KEYS] = shape(np.int32, rows[PASSAGE])
    batch[IS_REAL] = shape(np.float32, n_queries)
    if step.config.objective.needs_teacher:
        batch[TEACHER] = shape(np.float32, n_queries, group)
    return batch


def _report(
    name: str, devices: list[Any], batch: Mapping[str, Any], memory: StepMemory, seconds: float
) -> str:
    limit = memory_limit(devices[0])
    count = len(devices)
    queries, passages = (batch[IDS.format(role)].shape for role in (QUERY, PASSAGE))
    parts = {
        "weights and moments": memory.weights,
        "gradient": memory.gradients,
        "batch": memory.batch,
        "temporary": memory.temporary,
    }
    has = f" of {limit / GIGABYTE:.2f} GB" if limit else ""
    return "\n".join(
        [
            f"{name}: {count} devices ({devices[0].device_kind}); compiled in {seconds:.0f} s",
            f"on each device: {queries[0] // count} queries of {queries[1]} tokens and "
            f"{passages[0] // count} passages of {passages[1]} tokens",
            *(f"  {part:20}{bytes_ / GIGABYTE:8.3f} GB" for part, bytes_ in parts.items()),
            f"  {'together':20}{memory.total / GIGABYTE:8.3f} GB{has}: it fits",
        ]
    )
