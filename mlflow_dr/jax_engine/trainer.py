"""The trainer of `--engine jax`: ours for torch, with another step.

Data, schedules, callbacks, metrics, checkpoints and resuming are those of `RetrieverTrainer`. The
torch encoder stays on the processor; it tokenises, and it gets the weights when it is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import TrainingArguments

from mlflow_dr import compat
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import TrainingError, one_line
from mlflow_dr.jax_engine.batch import local_batch, padded_length
from mlflow_dr.jax_engine.devices import (
    compiled,
    everywhere,
    find_devices,
    is_out_of_memory,
    join_hosts,
    keep_compiled,
    mesh_of,
    to_host,
)
from mlflow_dr.jax_engine.encoder import weights_of
from mlflow_dr.jax_engine.memory import StepMemory, larger_than_memory
from mlflow_dr.jax_engine.step import Step, StepConfig
from mlflow_dr.training.batches import PASSAGE, QUERY, QUERY_IDS
from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

if TYPE_CHECKING:
    from mlflow_dr.training.arguments import EngineArguments

log = logging.getLogger(__name__)


class JaxTrainer(RetrieverTrainer):
    """A trainer whose gradients and weights are JAX's.

    Raises:
        UsageError: the encoder or the loss is not written in JAX.
        DeviceError: JAX cannot use its devices.
    """

    def __init__(self, parts: TrainerParts) -> None:
        encoder, arguments = parts.encoder, parts.arguments
        devices = find_devices()
        compat.use_devices(arguments, jax.local_device_count())
        super().__init__(parts)
        keep_compiled()
        self._pad_ids = parts.collator.pad_ids
        self._device = jax.local_devices()[0]
        names = {id(weight): name for name, weight in encoder.named_parameters()}
        self._names = {id(weight): names[id(weight)] for weight in encoder.parameters()}
        decayed = set(self.get_decay_parameter_names(encoder))
        decay = arguments.weight_decay
        self._step = Step(
            encoder,
            StepConfig.of(arguments, parts.objective, parts.chunk_sizes),
            mesh_of(devices),
            {
                name: decay if name in decayed else 0.0
                for name, weight in encoder.named_parameters()
                if weight.requires_grad
            },
        )
        self._state: _State | None = None
        self._gradients: dict[int, Any] = {}
        encoder.register_state_dict_pre_hook(lambda *_: self.copy_weights())
        log.info("training by JAX on %d %s", len(devices), devices[0].device_kind)

    @staticmethod
    def join(arguments: TrainingArguments, engine: EngineArguments) -> None:
        """Find hosts and devices, before anything asks which process this is.

        Raises:
            UsageError: flags of hosts are missing.
            DeviceError: the hosts do not find each other, or JAX cannot use its devices.
        """
        join_hosts(engine.coordinator, engine.n_hosts, engine.host_index)
        compat.find_processes(arguments)
        find_devices()
        compat.use_devices(arguments, jax.local_device_count())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, whose step is JAX's; torch's has the learning rates and writes the checkpoints."""
        _, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer_cls_and_kwargs = (_AdamW, options)
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, _AdamW):
            optimizer.trainer = self
        return optimizer

    def _wrap_model(self, model: Any, *arguments: Any, **options: Any) -> Any:
        """Keep the model from torch's ways of training on several devices."""
        return model if isinstance(model, _Unwrapped) else _Unwrapped(model)

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The gradient of one batch, added to those of the step; returns its share of the loss."""
        state = self._begun()
        n_batches = self.current_gradient_accumulation_steps
        length = self._passage_length(inputs)
        local = local_batch(
            inputs,
            self.args.train_batch_size,
            {QUERY: self._encoder.query_encoder.settings.query_max_length, PASSAGE: length},
            self._pad_ids,
            self._objective.needs_teacher,
            state.format,
        )
        split = self._step.split
        batch = {
            name: jax.make_array_from_process_local_data(split, rows)
            for name, rows in local.items()
        }
        number = self.state.global_step * self.args.gradient_accumulation_steps + state.n_batches
        function = self._gradient_function(length, batch)
        one = np.ones((), state.format)
        try:
            loss, norm, state.summed = function(
                state.trained,
                state.frozen,
                state.summed,
                batch,
                np.uint32(self.args.seed),
                np.uint32(number),
                one / n_batches,
            )
            value, state.norm = float(to_host(loss)), float(to_host(norm))
        except jax.errors.JaxRuntimeError as error:
            raise self._failed(error, batch) from error
        state.n_batches += 1
        result = torch.tensor(value)
        self.losses.note(result, self.state.global_step + 1, inputs[QUERY_IDS])
        return result / n_batches

    def _passage_length(self, inputs: Mapping[str, Any]) -> int:
        """The length to which passages are padded, the same in all processes."""
        longest = torch.tensor(inputs[PASSAGE]["input_ids"].shape[1])
        if self.args.world_size > 1:
            distributed.all_reduce(longest, distributed.ReduceOp.MAX)
        return padded_length(int(longest), self._encoder.settings.passage_max_length)

    def _gradient_function(self, length: int, batch: Mapping[str, Any]) -> Any:
        """The gradient, compiled for passages of a length.

        Raises:
            TrainingError: it needs more memory than there is.
        """
        if length not in self._gradients:
            state = self._begun()
            lowered = self._step.lower_gradient(state.trained, state.frozen, batch)
            try:
                function = compiled(lowered, f"the step for passages of {length} tokens")
            except jax.errors.JaxRuntimeError as error:
                raise self._failed(error, batch) from error
            memory = StepMemory.of(function, state.trained)
            if not memory.fits(self._device):
                raise larger_than_memory(self._step, state.trained, state.frozen, batch, memory)
            log.info("a step uses %.2f GB on each device", memory.total / 1e9)
            self._gradients[length] = function
        return self._gradients[length]

    def _failed(self, error: Exception, batch: Mapping[str, Any]) -> TrainingError:
        """What an error of XLA says to the user."""
        state = self._begun()
        if is_out_of_memory(error):
            return larger_than_memory(self._step, state.trained, state.frozen, batch, None, error)
        return TrainingError(
            f"step {self.state.global_step + 1} failed in XLA ({one_line(error)}); published "
            "checkpoints are kept"
        )

    def _clip_grad_norm(self, model: Any) -> float:
        """The norm of the gradient; AdamW's step clips it."""
        return self._begun().norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm of the gradient."""
        return self._begun().norm

    def update(self, rate: float) -> None:
        """AdamW's step, with the gradients so far; `_AdamW` calls it."""
        state = self._begun()
        if state.update is None:
            state.update = compiled(self._step.lower_update(state.trained), "AdamW's step")
        state.number += 1
        values = self._step.scalars_of_update(
            rate, state.number, state.norm, self.args.max_grad_norm
        )
        scalars = {name: np.array(value, state.format) for name, value in values.items()}
        state.trained, state.first, state.second = state.update(
            state.trained, state.first, state.second, state.summed, scalars
        )
        state.begin_sum(self.args.gradient_accumulation_steps > 1)
        state.is_newer = True

    def copy_weights(self) -> None:
        """Copy the weights to the torch encoder, if they have changed since the last time."""
        if self._state is None or not self._state.is_newer:
            return
        self._state.is_newer = False
        for name, weight in self._encoder.named_parameters():
            if name in self._state.trained:
                weight.detach().numpy()[...] = to_host(self._state.trained[name])

    def copy_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Give torch's AdamW a copy of the moments."""
        if self._state is None:
            return
        for weight in _weights(optimizer):
            name = self._names[id(weight)]
            optimizer.state[weight] = {
                "step": torch.tensor(float(self._state.number)),
                "exp_avg": torch.from_numpy(to_host(self._state.first[name]).copy()),
                "exp_avg_sq": torch.from_numpy(to_host(self._state.second[name]).copy()),
            }

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as Trainer does; the torch encoder has the last weights at the end."""
        result = super().train(*arguments, **options)
        self.copy_weights()
        return result

    @property
    def has_begun(self) -> bool:
        """Whether weights and moments are on the devices."""
        return self._state is not None

    def _begun(self) -> _State:
        """The state on the devices: the weights and moments that torch has at the first step."""
        if self._state is None:
            if self.args.world_size > 1:  # the hosts must begin with the same bits
                for weight in self._encoder.state_dict().values():
                    distributed.broadcast(weight, 0)
            raw: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            self._state = _State(self._encoder, self._names, raw, self._step.everywhere)
            self._state.begin_sum(self.args.gradient_accumulation_steps > 1)
        return self._state


class _State:
    """What is on the devices.

    Attributes:
        trained: the weights that are trained.
        frozen: the other weights.
        first: AdamW's first moments.
        second: AdamW's second moments.
        number: steps of AdamW so far.
        summed: the sum of gradients of this step.
        norm: its norm.
        n_batches: number of batches in it.
        is_newer: whether the torch encoder has older weights.
        update: AdamW's step, compiled.
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Mapping[int, str],
        optimizer: torch.optim.Optimizer,
        sharding: Any,
    ) -> None:
        weights = weights_of(encoder)
        moved = {names[id(weight)]: optimizer.state.get(weight) for weight in _weights(optimizer)}
        zeros = {name: np.zeros_like(weights[name]) for name in moved}
        steps = [int(moments["step"]) for moments in moved.values() if moments]

        def placed(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
            return {name: everywhere(value, sharding) for name, value in values.items()}

        def moment(kind: str) -> dict[str, np.ndarray]:
            return {
                name: moments[kind].numpy() if moments else zeros[name]
                for name, moments in moved.items()
            }

        self.trained = placed({name: weights[name].copy() for name in moved})
        self.frozen = placed({name: v.copy() for name, v in weights.items() if name not in moved})
        self.first, self.second = placed(moment("exp_avg")), placed(moment("exp_avg_sq"))
        self.number = max(steps, default=0)
        self.format = next(iter(zeros.values())).dtype
        self.summed: dict[str, Any] | None = None
        self.norm = 0.0
        self.n_batches = 0
        self.is_newer = False
        self.update: Any = None
        self._zeros = jax.jit(
            lambda like: jax.tree.map(jax.numpy.zeros_like, like), out_shardings=sharding
        )
        optimizer.state.clear()

    def begin_sum(self, accumulates: bool) -> None:
        """Begin a new sum of gradients."""
        self.n_batches = 0
        self.summed = self._zeros(self.trained) if accumulates else None


class _AdamW(torch.optim.AdamW):
    """torch's AdamW without a step of its own: its groups, learning rates and checkpoints."""

    trainer: JaxTrainer | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Have JAX change the weights."""
        if self.trainer is not None:
            self.trainer.update(float(self.param_groups[0]["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's AdamW has it, with JAX's moments."""
        if self.trainer is not None:
            self.trainer.copy_moments(self)
        values = super().state_dict()
        if self.trainer is not None and self.trainer.has_begun:
            self.state.clear()  # the moments are on the devices
        return values


class _Unwrapped(nn.Module):
    """A model that Trainer takes for one that is wrapped already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
