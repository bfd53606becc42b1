"""Loss and gradients of a batch, held against torch's in fp64; AdamW against torch's."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.jax_engine.batch import local_batch, padded_length
from mlflow_dr.jax_engine.encoder import weights_of
from mlflow_dr.jax_engine.step import Step, StepConfig
from mlflow_dr.training.loss import Objective

Make = Callable[..., Any]
N_QUERIES, N_REAL, GROUP = 8, 7, 2
MIXED: dict[str, Any] = {
    "temperature": 0.05,
    "distil_weight": 0.3,
    "distil_temperature": 0.5,
    "matryoshka_dims": (8,),
    "normalize": True,
}


@pytest.fixture
def encoder(make_backbone: Make) -> Encoder:
    return make_backbone("bert", normalize=True).double()


@pytest.fixture
def inputs(make_texts: Make) -> dict[str, Any]:
    """Seven queries with two passages each; passages 0 and 8 are one."""
    n_passages = N_REAL * GROUP
    keys = torch.arange(n_passages)
    keys[8] = 0
    return {
        "query": make_texts([2 + 3 * i % 5 for i in range(N_REAL)]),
        "passage": make_texts([3 + 5 * i % 11 for i in range(n_passages)]),
        "keys": keys,
        "teacher": torch.rand(N_REAL, GROUP, generator=torch.Generator().manual_seed(0)),
    }


def of_torch(
    encoder: Encoder, objective: Objective, inputs: Mapping[str, Any]
) -> tuple[float, dict[str, np.ndarray]]:
    encoder.zero_grad()
    vectors = [encoder(**inputs[role]) for role in ("query", "passage")]
    loss = objective(*vectors, inputs["keys"], inputs["teacher"])
    loss.backward()
    return loss.item(), {name: w.grad.numpy() for name, w in encoder.named_parameters()}


def relative(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> float:
    """The relative L2 distance of two gradients."""
    squares = sum(((np.asarray(ours[name]) - theirs[name]) ** 2).sum() for name in theirs)
    return float(np.sqrt(squares / sum((value**2).sum() for value in theirs.values())))


def step_of(encoder: Encoder, n_devices: int, config: StepConfig) -> Step:
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("devices",))
    return Step(encoder, config, mesh, dict.fromkeys(weights_of(encoder), 0.1))


@pytest.mark.parametrize(
    ("n_devices", "sizes", "scores_at_once"),
    [
        (1, None, 1 << 26),
        (1, {"query": 3, "passage": 5}, 40),
        (4, None, 1 << 26),
        (4, {"query": 1, "passage": 3}, 1 << 26),
    ],
    ids=["plain", "cached", "four devices", "four devices, cached"],
)
def test_loss_and_gradient_are_those_of_torch(
    in_fp64: None,
    encoder: Encoder,
    inputs: dict[str, Any],
    n_devices: int,
    sizes: dict[str, int] | None,
    scores_at_once: int,
) -> None:
    """A short batch, duplicates, a teacher, fewer dimensions; devices have the passages of all."""
    loss, gradient = of_torch(encoder, Objective(**MIXED), inputs)
    objective = Objective(across_devices=n_devices > 1, scores_at_once=scores_at_once, **MIXED)
    step = step_of(encoder, n_devices, StepConfig(objective, sizes))
    lengths, pads = {"query": 8, "passage": 16}, {"query": 0, "passage": 0}
    local = local_batch(inputs, N_QUERIES, lengths, pads, True, np.float64)
    batch = {name: jax.device_put(rows, step.split) for name, rows in local.items()}
    weights = {name: jax.device_put(w, step.everywhere) for name, w in weights_of(encoder).items()}
    function = step.lower_gradient(weights, {}, batch).compile()
    numbers = (np.uint32(0), np.uint32(0))
    ours, norm, gradients = function(weights, {}, None, batch, *numbers, np.float64(1))
    assert float(ours) == pytest.approx(loss, rel=1e-12)
    assert relative(gradients, gradient) < 1e-10
    squares = sum((value**2).sum() for value in gradient.values())
    assert float(norm) == pytest.approx(float(np.sqrt(squares)), rel=1e-10)


def test_adamw_is_that_of_torch(in_fp64: None, encoder: Encoder) -> None:
    """Two steps with clipping and decay."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    step = step_of(encoder, 1, StepConfig(Objective()))
    state = {name: jax.numpy.array(w.copy()) for name, w in weights_of(encoder).items()}
    moments = [{name: w * 0 for name, w in state.items()} for _ in range(2)]
    update = step.lower_update(state).compile()
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2):
        for weight in encoder.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        gradient = {  # copies: JAX reads them in the background, and torch changes its own
            n: jax.numpy.array(w.grad.numpy().copy()) for n, w in encoder.named_parameters()
        }
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 0.5).item()
        optimizer.step()
        scalars = step.scalars_of_update(0.1, number, norm, 0.5)
        numbers = {name: np.float64(value) for name, value in scalars.items()}
        state, *moments = update(state, *moments, gradient, numbers)
    for name, weight in encoder.named_parameters():
        np.testing.assert_allclose(state[name], weight.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_a_loss_of_another_package_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="has the losses contrastive and distillation, not 'x'"):
        step_of(encoder, 1, StepConfig(Objective(loss="x")))


@pytest.mark.parametrize(
    ("longest", "limit", "length"), [(1, 128, 32), (33, 128, 64), (150, 156, 156), (20, 20, 20)]
)
def test_passages_are_padded_to_multiples_of_32(longest: int, limit: int, length: int) -> None:
    assert padded_length(longest, limit) == length
