"""The objective of `mlflow_dr.training.loss` in JAX, on one device of several."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp, xlogy

from mlflow_dr.errors import UsageError
from mlflow_dr.jax_engine.encoder import unit_vectors
from mlflow_dr.training.flags import OWN_LOSSES
from mlflow_dr.training.loss import Objective

DEVICES = "devices"
"""The axis of the mesh."""
CONTRASTIVE, DISTILLATION = OWN_LOSSES


@dataclass(frozen=True)
class LossArrays:
    """The vectors of a batch on one device, at least in fp32.

    Attributes:
        queries: `(n_queries, dim)`.
        passages: `(n_queries * group, dim)`; the positive of a query comes first of its own.
        is_real: `(n_queries,)`, 1 for a query and 0 for a row that fills the batch up. Such a row
            has no part in the loss, and its passages are no negatives.
        keys: `(n_queries * group,) int32`, equal for equal passages; None without such a mask.
        teacher: `(n_queries, group)`, a teacher's scores of each query's own passages.
    """

    queries: Array
    passages: Array
    is_real: Array
    keys: Array | None = None
    teacher: Array | None = None

    @property
    def group(self) -> int:
        """Passages of a query."""
        return int(self.passages.shape[0] // self.queries.shape[0])


def check_objective(objective: Objective) -> None:
    """Refuse a loss that is not written in JAX.

    Raises:
        UsageError: with the losses that are.
    """
    if objective.loss not in OWN_LOSSES:
        raise UsageError(
            f"--engine jax has the losses {' and '.join(OWN_LOSSES)}, not {objective.loss!r}; "
            "use --engine torch"
        )


def summed_loss(objective: Objective, inputs: LossArrays) -> Array:
    """The sum of the losses of this device's queries; to be divided by their number on all devices.

    With `across_devices` the passages of all devices are negatives. It must be called inside
    `shard_map`, over the axis `DEVICES`.
    """
    total = _loss(objective, inputs)
    for dims in objective.matryoshka_dims:
        vectors = inputs.queries[:, :dims], inputs.passages[:, :dims]
        if objective.normalize:
            vectors = unit_vectors(vectors[0]), unit_vectors(vectors[1])
        total = total + _loss(objective, replace(inputs, queries=vectors[0], passages=vectors[1]))
    return total


def _loss(objective: Objective, inputs: LossArrays) -> Array:
    """The summed loss of vectors of one number of dimensions."""
    weight = objective.distil_weight
    total = jnp.zeros((), inputs.queries.dtype)
    if weight < 1:
        own = _contrastive if objective.loss == CONTRASTIVE else _distillation
        total = (1 - weight) * own(objective, inputs)
    if weight > 0 and inputs.teacher is not None:
        total = total + weight * _distillation(objective, inputs)
    return total


def _contrastive(objective: Objective, inputs: LossArrays) -> Array:
    """InfoNCE; a score matrix that is too large is computed in parts, forward and backward."""
    passages, keys = inputs.passages, inputs.keys if objective.mask_duplicates else None
    is_real = jnp.repeat(inputs.is_real, inputs.group)
    n_queries = inputs.queries.shape[0]
    positives = jnp.arange(n_queries) * inputs.group
    own_keys = positives if keys is None else keys[positives]
    if objective.across_devices:
        positives = positives + jax.lax.axis_index(DEVICES) * passages.shape[0]
        passages, is_real = _gathered(passages), _gathered(is_real)
        keys = None if keys is None else _gathered(keys)
    columns = jnp.arange(passages.shape[0])

    def loss(query: Array, positive: Array, own_key: Array) -> Array:
        scores = jnp.matmul(passages, query, precision=jax.lax.Precision.HIGHEST)
        scores = scores / objective.temperature
        blocked = is_real == 0
        if keys is not None:
            blocked = blocked | (keys == own_key)
        blocked = blocked & (columns != positive)
        return logsumexp(jnp.where(blocked, -jnp.inf, scores)) - scores[positive]

    rows = max(1, objective.scores_at_once // passages.shape[0])
    of_rows = jax.vmap(loss)
    per_query = (inputs.queries, positives, own_keys)
    if rows >= n_queries:
        losses = of_rows(*per_query)
    else:
        again = jax.checkpoint(loss)
        losses = jax.lax.map(lambda row: again(*row), per_query, batch_size=rows)
    return (losses * inputs.is_real).sum()


def _distillation(objective: Objective, inputs: LossArrays) -> Array:
    """Kullback-Leibler divergence from a teacher's scores."""
    if inputs.teacher is None:
        raise UsageError("the loss 'distillation' needs a teacher's scores of the passages")
    shape = (inputs.queries.shape[0], inputs.group, -1)
    own = inputs.passages.reshape(shape)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("qd,qpd->qp", inputs.queries, own, precision=exact)
    scores = scores / objective.temperature
    teacher = inputs.teacher.astype(scores.dtype) / objective.distil_temperature
    wanted = jax.nn.softmax(teacher, axis=1)
    divergence = xlogy(wanted, wanted) - wanted * jax.nn.log_softmax(scores, axis=1)
    return (divergence.sum(axis=1) * inputs.is_real).sum()


def _gathered(rows: Array) -> Array:
    """The rows of all devices, in the order of the devices; the gradient flows to our own."""
    return jax.lax.all_gather(rows, DEVICES, tiled=True)
