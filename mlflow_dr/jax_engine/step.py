"""The step: the gradient of a batch over all devices, and AdamW.

Weights, gradients and AdamW's moments are dictionaries by the names of `Encoder.state_dict()`, each
copied to all devices. A batch is split over the devices. Everything that differs from step to step
(learning rate, number of the step, random numbers) is an argument, so that each shape of a batch is
compiled once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import TrainingArguments

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.jax_engine.encoder import Encode, Weights, encode_functions
from mlflow_dr.jax_engine.loss import DEVICES, LossArrays, check_objective, summed_loss
from mlflow_dr.training.batches import PASSAGE, QUERY
from mlflow_dr.training.loss import Objective

IDS, MASK = "{}_ids", "{}_mask"
KEYS, TEACHER, IS_REAL = "keys", "teacher", "is_real"
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
RANDOM = "rbg"  # a kind of random numbers that TPUs and processors make fast

Batch = Mapping[str, Any]
"""Arrays of a batch or their shapes, by the names above.

`query_ids`, `query_mask`: `(n_queries, length) int32`; `passage_ids`, `passage_mask`: `(n_queries *
group, length) int32`; `keys`: `(n_queries * group,) int32`; `teacher`: `(n_queries, group)`;
`is_real`: `(n_queries,)`, 0 for a row that only fills the batch up.
"""


@dataclass(frozen=True)
class StepConfig:
    """How a step is computed.

    Attributes:
        objective: the loss.
        chunk_sizes: texts in a chunk of the gradient cache on each device, by role; None without
            the cache.
        bf16: whether the backbone computes in bf16; weights, loss and pooling are in fp32.
        recompute: whether the backward pass computes the inside of each layer again.
        accumulates: whether the gradients of several batches are summed before AdamW's step.
        betas: AdamW's.
        epsilon: AdamW's.
    """

    objective: Objective
    chunk_sizes: Mapping[str, int] | None = None
    bf16: bool = False
    recompute: bool = False
    accumulates: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    @classmethod
    def of(
        cls,
        arguments: TrainingArguments,
        objective: Objective,
        chunk_sizes: Mapping[str, int] | None,
    ) -> StepConfig:
        """What training flags say."""
        return cls(
            objective,
            chunk_sizes,
            bf16=bool(arguments.bf16),
            recompute=bool(arguments.activation_checkpointing),
            accumulates=arguments.gradient_accumulation_steps > 1,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            epsilon=arguments.adam_epsilon,
        )


class Step:
    """The two compiled functions of a step: the gradient of a batch, and the change of the weights.

    Args:
        encoder: gives the settings and the names of the weights that are trained.
        config: how the step is computed.
        mesh: the devices, along the one axis `DEVICES`.
        decays: name -> AdamW's weight decay of each trained weight.

    Raises:
        UsageError: the encoder or the loss is not written in JAX.
    """

    def __init__(
        self, encoder: Encoder, config: StepConfig, mesh: Mesh, decays: Mapping[str, float]
    ) -> None:
        check_objective(config.objective)
        dtype = jnp.bfloat16 if config.bf16 else None
        query, passage = encode_functions(encoder, dtype, config.recompute)
        self._encoders: dict[str, Encode] = {QUERY: query, PASSAGE: passage}
        self._decays = dict(decays)
        self.config = config
        self.mesh = mesh
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(DEVICES))

    def with_chunks(self, chunk_sizes: Mapping[str, int]) -> Step:
        """The same step with another gradient cache."""
        other = copy.copy(self)
        other.config = replace(self.config, chunk_sizes=chunk_sizes)
        return other

    def lower_gradient(self, trained: Any, frozen: Any, batch: Batch) -> Any:
        """The function that gives the gradient, traced for the shapes of these arguments.

        Compiled, it takes trained and frozen weights, the sum of gradients so far (None if nothing
        is accumulated; its memory is used again), a batch, the seed, the number of the batch in
        the training, and a factor of the loss. It gives the loss of the batch without the factor,
        the norm of the gradient, and the gradient.
        """
        batch_specs = {name: PartitionSpec(DEVICES) for name in batch}
        local = jax.shard_map(
            self._local_gradient,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), batch_specs, PartitionSpec()),
            out_specs=(PartitionSpec(), PartitionSpec()),
            check_vma=False,
        )

        def gradient(
            trained: Weights,
            frozen: Weights,
            summed: Weights | None,
            batch: Batch,
            seed: Array,
            number: Array,
            factor: Array,
        ) -> tuple[Array, Array, Weights]:
            key = jax.random.fold_in(jax.random.key(seed, impl=RANDOM), number)
            loss, own = local(trained, frozen, batch, jax.random.key_data(key))
            gradients = {name: value * factor for name, value in own.items()}
            if summed is not None:
                gradients = {name: value + summed[name] for name, value in gradients.items()}
            squares = [(value * value).sum() for value in gradients.values()]
            return loss, jnp.sqrt(sum(squares)), gradients

        summed = trained if self.config.accumulates else None
        number = jax.ShapeDtypeStruct((), np.uint32, sharding=self.everywhere)
        factor = jax.ShapeDtypeStruct((), _format(trained), sharding=self.everywhere)
        with self._precision():
            donated = (2,) if self.config.accumulates else ()
            function = jax.jit(gradient, donate_argnums=donated, out_shardings=self.everywhere)
            return function.lower(trained, frozen, summed, batch, number, number, factor)

    def lower_update(self, trained: Any) -> Any:
        """AdamW's step as torch computes it, traced for these weights.

        Compiled, it takes trained weights and both moments, whose memory is used again, the
        gradient, and `scalars_of_update`. It gives the weights and the moments.
        """
        function = jax.jit(self._update, donate_argnums=(0, 1, 2), out_shardings=self.everywhere)
        scalar = jax.ShapeDtypeStruct((), _format(trained), sharding=self.everywhere)
        scalars = dict.fromkeys(("clip", "rate", "corrected_rate", "corrected_root"), scalar)
        return function.lower(trained, trained, trained, trained, scalars)

    def scalars_of_update(
        self, rate: float, number: int, norm: float, max_norm: float
    ) -> dict[str, float]:
        """What AdamW's step takes beside arrays; computed in fp64, as torch does.

        Args:
            rate: the learning rate.
            number: the step, counted from 1.
            norm: the norm of the gradient.
            max_norm: the largest norm; 0 for no limit.
        """
        first, second = self.config.betas
        return {
            "clip": min(1.0, max_norm / (norm + CLIP_EPSILON)) if max_norm > 0 else 1.0,
            "rate": rate,
            "corrected_rate": rate / (1 - first**number),
            "corrected_root": float(np.sqrt(1 - second**number)),
        }

    def _precision(self) -> Any:
        """fp32 means fp32: by default a TPU multiplies fp32 matrices in bf16."""
        return jax.default_matmul_precision("default" if self.config.bf16 else "highest")

    def _local_gradient(
        self, trained: Weights, frozen: Weights, batch: Mapping[str, Array], key_data: Array
    ) -> tuple[Array, Weights]:
        """The loss of the whole batch and its gradient; each device computes its own queries.

        The loss is differentiated before it is summed over the devices. The gradient at another
        device's passages comes back through `all_gather`.
        """
        config = self.config
        n_real = jax.lax.psum(batch[IS_REAL].sum(), DEVICES)
        key = jax.random.wrap_key_data(key_data, impl=RANDOM)
        key = jax.random.fold_in(key, jax.lax.axis_index(DEVICES))

        def loss(trained: Weights) -> Array:
            weights = {**trained, **frozen}
            vectors = {
                role: self._vectors(role, weights, batch, jax.random.fold_in(key, position))
                for position, role in enumerate((QUERY, PASSAGE))
            }
            inputs = LossArrays(
                vectors[QUERY], vectors[PASSAGE], batch[IS_REAL], batch[KEYS], batch.get(TEACHER)
            )
            return summed_loss(config.objective, inputs) / n_real

        value, gradients = jax.value_and_grad(loss)(dict(trained))
        return jax.lax.psum(value, DEVICES), jax.lax.psum(gradients, DEVICES)

    def _vectors(
        self, role: str, weights: Weights, batch: Mapping[str, Array], key: Array
    ) -> Array:
        """Vectors of a role's texts on this device; in chunks with the gradient cache."""
        ids, mask = batch[IDS.format(role)], batch[MASK.format(role)]
        sizes = self.config.chunk_sizes
        size = sizes[role] if sizes else len(ids)
        encode = self._encoders[role]
        if size >= len(ids):
            return encode(weights, ids, mask, key)
        return _in_chunks(encode, weights, ids, mask, key, size)

    def _update(
        self,
        trained: Weights,
        first: Weights,
        second: Weights,
        gradients: Weights,
        scalars: Mapping[str, Array],
    ) -> tuple[Weights, Weights, Weights]:
        beta1, beta2 = self.config.betas
        moved: dict[str, Array] = {}
        firsts: dict[str, Array] = {}
        seconds: dict[str, Array] = {}
        for name, weight in trained.items():
            gradient = gradients[name] * scalars["clip"]
            firsts[name] = beta1 * first[name] + (1 - beta1) * gradient
            seconds[name] = beta2 * second[name] + (1 - beta2) * gradient * gradient
            root = jnp.sqrt(seconds[name]) / scalars["corrected_root"] + self.config.epsilon
            kept = weight * (1 - scalars["rate"] * self._decays[name])
            moved[name] = kept - scalars["corrected_rate"] * firsts[name] / root
        return moved, firsts, seconds


def _format(weights: Any) -> Any:
    """The number format of weights."""
    return next(iter(weights.values())).dtype


def _in_chunks(
    encode: Encode, weights: Weights, ids: Array, mask: Array, key: Array, size: int
) -> Array:
    """Vectors `(n_texts, dim)` whose gradient needs the memory of one chunk.

    Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP
    2021. The backward pass of the scan encodes one chunk again, with the same dropout, propagates
    the gradient at its vectors, and adds to the gradient of the weights.

    Args:
        encode: the encoder.
        weights: its weights.
        ids: `(n_texts, length)`.
        mask: `(n_texts, length)`.
        key: for dropout.
        size: texts in a chunk; the last chunk is filled up with copies of the last text.
    """
    n_texts = len(ids)
    n_chunks = -(-n_texts // size)

    def cut(rows: Array) -> Array:
        filled = jnp.pad(rows, ((0, n_chunks * size - n_texts), (0, 0)), mode="edge")
        return filled.reshape(n_chunks, size, -1)

    @partial(jax.checkpoint, prevent_cse=False)
    def vectors(weights: Weights, ids: Array, mask: Array, number: Array) -> Array:
        return encode(weights, ids, mask, jax.random.fold_in(key, number))

    def body(nothing: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Array]:
        return nothing, vectors(weights, *chunk)

    _, parts = jax.lax.scan(body, None, (cut(ids), cut(mask), jnp.arange(n_chunks)))
    return parts.reshape(n_chunks * size, -1)[:n_texts]
