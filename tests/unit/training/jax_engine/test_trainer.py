"""The trainer of `--engine jax`, held against torch's on the same batches."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.errors import CheckpointError, TrainingError
from mlflow_dr.jax_engine.trainer import JaxTrainer
from mlflow_dr.training.callbacks import StopCallback
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.resume import begin_output, find_resumption

Make = Callable[..., Any]
ACROSS = Objective(temperature=0.05, across_devices=True)


@pytest.fixture
def train(make_trainer: Make, make_backbone: Make, tmp_path: Path) -> Make:
    """A function from a trainer's class and arguments to a trainer that has trained.

    One process of torch has the batch of four devices.
    """

    def train(kind: Any, resumes: bool = False, dropout: float = 0.0, **arguments: Any) -> Any:
        encoder = arguments.pop("encoder", None) or make_backbone("bert", normalize=True)
        encoder.backbone.config.hidden_dropout_prob = dropout
        given = {
            "directory": tmp_path / "output",
            "per_device_train_batch_size": 1 if kind is JaxTrainer else 4,
            "objective": ACROSS,
            "max_grad_norm": 0.5,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
            "learning_rate": 1e-2,
            **arguments,
        }
        trainer = make_trainer(encoder, kind=kind, **given)
        found = find_resumption(given["directory"], "true") if resumes else None
        if found is None and given.get("save_strategy"):
            begin_output(given["directory"], "run-1")
        trainer.resume(found.checkpoint if found else None)
        return trainer

    return train


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [logs[name] for logs in trainer.state.log_history if name in logs]


def test_losses_norms_and_weights_are_those_of_torch(train: Make) -> None:
    """Twenty steps of two accumulated batches, with clipping, decay and a schedule."""
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2}
    torchs, ours = (train(kind, **settings) for kind in (None, JaxTrainer))
    np.testing.assert_allclose(logged(ours), logged(torchs), atol=1e-5)
    for name in ("grad_norm", "learning_rate"):
        np.testing.assert_allclose(logged(ours, name), logged(torchs, name), rtol=1e-3)
    assert len(logged(ours)) == 20
    theirs = torchs._encoder.state_dict()
    for name, weight in ours._encoder.state_dict().items():
        # scores do not depend on the bias of keys: its gradient is rounding, which AdamW scales up
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-3, msg=name)


SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def test_a_resumed_training_has_the_bits_of_one_without_a_stop(train: Make) -> None:
    """With dropout."""
    complete = train(JaxTrainer, dropout=0.2, **SAVING)

    class StopAt(StopCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 4:
                self.ask("test")
            super().on_step_end(args, state, control, **options)

    stopped = train(JaxTrainer, dropout=0.2, callbacks=[StopAt()], **SAVING)
    assert stopped.state.global_step == 4
    resumed = train(JaxTrainer, resumes=True, dropout=0.2, **SAVING)
    assert logged(resumed) == logged(complete)
    for ours, theirs in zip(
        resumed._encoder.parameters(), complete._encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_training_that_was_killed_after_any_step_goes_on_with_the_same_bits(
    train: Make, tmp_path: Path
) -> None:
    """What a kill leaves: the checkpoints up to some step."""
    settings = {**SAVING, "save_steps": 1, "dropout": 0.2}
    complete = train(JaxTrainer, **settings)
    for step in range(complete.state.max_steps - 1, 0, -1):
        shutil.rmtree(tmp_path / "output" / f"checkpoint-{step + 1}")
        resumed = train(JaxTrainer, resumes=True, **{**settings, "save_strategy": "no"})
        assert logged(resumed) == logged(complete)
        weights = zip(resumed._encoder.parameters(), complete._encoder.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in weights)


@pytest.mark.parametrize("kinds", [(None, JaxTrainer), (JaxTrainer, None)], ids=["ours", "torchs"])
def test_a_run_of_one_engine_is_resumed_by_the_other(train: Make, kinds: tuple[Any, Any]) -> None:
    """Weights and moments: the losses are those of torch alone."""
    expected = logged(train(None, **SAVING))
    train(kinds[0], **{**SAVING, "callbacks": [_Stop(3)]})
    resumed = train(kinds[1], resumes=True, **SAVING)
    np.testing.assert_allclose(logged(resumed), expected, atol=1e-5)


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self._step


def test_a_checkpoint_gives_torch_the_same_vectors(
    train: Make, tmp_path: Path, make_texts: Make
) -> None:
    trainer = train(JaxTrainer, **SAVING)
    loaded = load_encoder(tmp_path / "output" / "checkpoint-6")
    texts = make_texts([4, 7])
    with torch.no_grad():
        ours, theirs = loaded(**texts), trainer._encoder(**texts)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = trainer._state.trained
    name = "backbone.embeddings.word_embeddings.weight"
    assert torch.equal(loaded.state_dict()[name], torch.from_numpy(np.array(weights[name])))


def test_weights_are_copied_only_when_they_are_asked_for(
    make_backbone: Make, train: Make, tmp_path: Path
) -> None:
    """A callback that publishes reads `state_dict`; other steps copy nothing."""
    encoder, seen = make_backbone("bert", normalize=True), {}

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            weight = encoder.backbone.embeddings.word_embeddings.weight
            before = weight.detach().clone()
            if state.global_step in (2, 4):
                encoder.state_dict()
            seen[state.global_step] = not torch.equal(before, weight)

    train(JaxTrainer, encoder=encoder, callbacks=[Reads()], max_steps=4)
    assert seen == {1: False, 2: True, 3: False, 4: True}


@pytest.mark.parametrize(("words", "step"), [(None, "1"), ("grey", r"\d")])
def test_a_loss_that_is_no_number_ends_the_training(
    train: Make, make_backbone: Make, words: str | None, step: str
) -> None:
    """Also where it is so on one device only: the texts of one example have the word."""
    encoder = make_backbone("bert", normalize=True)
    ids = (
        encoder.tokenizer(words, add_special_tokens=False)["input_ids"] if words else slice(8, None)
    )
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight[ids] = torch.nan
    with pytest.raises(TrainingError, match=rf"the loss of step {step} is nan \(queries"):
        train(JaxTrainer, encoder=encoder, objective=Objective(temperature=0.05))


def test_a_checkpoint_of_another_architecture_is_refused(train: Make, make_backbone: Make) -> None:
    train(JaxTrainer, **SAVING)
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        train(JaxTrainer, resumes=True, encoder=make_backbone("distilbert"), **SAVING)


def test_a_step_beyond_the_memory_is_refused_with_a_chunk_that_fits(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four texts on a device do not fit, and two do."""
    from mlflow_dr.jax_engine import memory

    needed: list[int] = []

    def limit(device: Any) -> int:
        return needed[0] - 1 if needed else 1 << 62

    real = memory.StepMemory.of

    def of(function: Any, trained: Any) -> Any:
        found = real(function, trained)
        needed.append(found.total)
        return found

    monkeypatch.setattr(memory.StepMemory, "of", of)
    monkeypatch.setattr(memory, "memory_limit", limit)
    with pytest.raises(TrainingError, match=r"a step asks for .* GB.*--gc_p_chunk_size \d+ would"):
        train(JaxTrainer, per_device_train_batch_size=64, max_steps=1)
