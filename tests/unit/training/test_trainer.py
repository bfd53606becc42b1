import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.training.arguments import RetrieverTrainingArguments
from mlflow_dr.training.batches import Collator, Group, TrainingSet
from mlflow_dr.training.loss import contrastive_loss
from mlflow_dr.training.trainer import (
    MetricCallback,
    PublishCallback,
    RetrieverTrainer,
    StopCallback,
)

WORDS = ("red", "green", "blue", "white", "black", "pink", "brown", "grey")


class Colours:
    """Eight questions with two right passages each."""

    digest = "colours"

    def __len__(self) -> int:
        return len(WORDS)

    def __getitem__(self, index: int) -> Example:
        word = WORDS[index]
        positives = [Passage(f"{word}{n}", "", f"all about {word} number {n}") for n in range(2)]
        return Example(Query(word, f"what is {word}"), positives, ())


class Recorded(TrainingSet):
    """Remembers which positives were read in which epoch."""

    def __init__(self) -> None:
        super().__init__(Colours(), 1, seed=0)
        self.read: dict[int, set[str]] = {}

    def __getitem__(self, index: int) -> Group:
        group = super().__getitem__(index)
        self.read.setdefault(self._epoch, set()).add(group.passages[0].id)
        return group


class Submitted:
    """Stands where the publisher is, and remembers."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    @property
    def last_step(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def submit(self, step: int) -> None:
        self.steps.append(step)


def trained(
    encoder: Encoder,
    room: Path,
    callbacks: list[Any],
    training_set: TrainingSet | None = None,
    chunk_sizes: Mapping[str, int] | None = None,
    **arguments: Any,
) -> RetrieverTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = RetrieverTrainer(
        encoder,
        RetrieverTrainingArguments(output_dir=str(room), **settings),
        training_set or TrainingSet(Colours(), 1, seed=0),
        Collator(Tokenizing(encoder.tokenizer, encoder.settings)),
        0.05,
        callbacks,
        chunk_sizes,
    )
    trainer.train()
    return trainer


def test_positives_rotate_from_epoch_to_epoch(tiny: Encoder, tmp_path: Path) -> None:
    recorded = Recorded()
    trained(tiny, tmp_path, [], recorded)
    assert set(recorded.read) == {0, 1}
    assert len(recorded.read[0]) == len(recorded.read[1]) == len(WORDS)
    assert not recorded.read[0] & recorded.read[1]


def test_a_step_is_the_step_of_a_plain_loop(tiny: Encoder, tmp_path: Path) -> None:
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(tiny).train()
    batch = Collator(Tokenizing(tiny.tokenizer, tiny.settings))(
        [TrainingSet(Colours(), 1, seed=0)[index] for index in range(8)]
    )
    trained(tiny, tmp_path, [], max_steps=1, per_device_train_batch_size=8, optim="sgd")
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    loss = contrastive_loss(plain(**batch["query"]), plain(**batch["passage"]), 0.05)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    for ours, theirs in zip(tiny.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_loss_is_written_at_its_step(tiny: Encoder, tmp_path: Path) -> None:
    written: list[tuple[int, Mapping[str, float]]] = []
    trained(tiny, tmp_path, [MetricCallback(lambda v, step: written.append((step, v)))])
    assert [step for step, values in written if "train/loss" in values][:4] == [1, 2, 3, 4]
    assert "train/learning_rate" in written[0][1]
    assert any("train/samples_per_second" in values for _, values in written)


def test_checkpoints_before_during_and_at_the_end(tiny: Encoder, tmp_path: Path) -> None:
    submitted = Submitted()
    callback = PublishCallback(submitted, every=3, initial=True)  # type: ignore[arg-type]
    trained(tiny, tmp_path, [callback])
    assert submitted.steps == [0, 3, 4]


def test_no_step_is_published_twice(tiny: Encoder, tmp_path: Path) -> None:
    submitted = Submitted()
    callback = PublishCallback(submitted, every=2, initial=False)  # type: ignore[arg-type]
    trained(tiny, tmp_path, [callback])
    assert submitted.steps == [2, 4]


def test_asked_to_stop_it_ends_after_the_step(tiny: Encoder, tmp_path: Path) -> None:
    stop = StopCallback()
    stop.ask("test")
    submitted = Submitted()
    callback = PublishCallback(submitted, every=0, initial=False)  # type: ignore[arg-type]
    trained(tiny, tmp_path, [callback, stop])
    assert submitted.steps == [1]


def test_trainers_own_checkpoints_are_encoder_directories(tiny: Encoder, tmp_path: Path) -> None:
    trained(tiny, tmp_path, [], save_strategy="steps", save_steps=2)
    saved = load_encoder(tmp_path / "checkpoint-4")
    assert saved.settings == tiny.settings
    for name, value in tiny.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_gradient_cache_changes_nothing(tiny: Encoder, tmp_path: Path) -> None:
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    cached = copy.deepcopy(tiny)
    settings = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 3}
    trained(tiny, tmp_path, [], optim="sgd", **settings)
    sizes = {"query": 2, "passage": 3}
    trained(cached, tmp_path, [], chunk_sizes=sizes, optim="sgd", **settings)
    for ours, theirs in zip(cached.parameters(), tiny.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
