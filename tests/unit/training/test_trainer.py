"""Our Trainer: its steps, its checkpoints, and going on from them."""

import copy
import errno
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import TrainingError
from mlflow_dr.training.batches import TrainingSet
from mlflow_dr.training.callbacks import StopCallback
from mlflow_dr.training.data import Mixture
from mlflow_dr.training.encoder_setup import collator_of
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.loss_check import LossCheck
from mlflow_dr.training.resume import begin_output, find_resumption
from mlflow_dr.training.trainer import RetrieverTrainer

Make = Callable[..., Any]
SIZES = {"query": 2, "passage": 3}


class Watched(Objective):
    """The objective; remembers the keys of each batch."""

    def __call__(self, queries: Tensor, passages: Tensor, keys: Any = None, *_: Any) -> Tensor:
        self.__dict__.setdefault("keys", []).append(keys.tolist())
        return super().__call__(queries, passages, keys)


class StopAt(StopCallback):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == self._step:
            self.ask("test")
        super().on_step_end(args, state, control, **options)


@pytest.mark.parametrize(
    ("sizes", "accumulation"), [(None, 1), (None, 3), (SIZES, 1), (SIZES, 3)], ids=str
)
def test_a_step_equals_that_of_a_plain_loop(
    make_small: Make,
    make_trainer: Make,
    colours: Any,
    set_of: Make,
    sizes: dict[str, int] | None,
    accumulation: int,
) -> None:
    """In fp64: mean over accumulated batches, clipping, then the optimizer; cached or not."""
    encoder: Encoder = make_small(normalize=True).double()
    plain = copy.deepcopy(encoder).train()
    groups = [set_of(encoder, colours, 3)[index] for index in range(6)]
    size = 6 // accumulation
    trainer: RetrieverTrainer = make_trainer(
        encoder,
        training_set=groups,
        chunk_sizes=sizes,
        max_steps=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.1,
    )
    batches: list[Any] = []
    collate = collator_of(encoder)
    trainer.data_collator = lambda some: batches.append(collate(some)) or batches[-1]
    trainer.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            assert len(batch["query"]["input_ids"]) == size
            vectors = {role: plain(**batch[role]) for role in ("query", "passage")}
            loss = Objective(0.05)(vectors["query"], vectors["passage"], batch["keys"])
            (loss / accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        logged = trainer.state.log_history[step]
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "workers",
    [
        {},
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=str,
)
def test_each_epoch_reads_the_next_positives(
    make_small: Make, make_trainer: Make, workers: dict[str, Any]
) -> None:
    """The epoch reaches the workers, also those that outlive it."""
    watched = Watched()
    trainer = make_trainer(make_small(), objective=watched, max_steps=6, **workers)
    trainer.train()
    dismiss_workers(trainer)
    keys = watched.__dict__["keys"]
    epochs = [set(keys[0] + keys[1]), set(keys[2] + keys[3]), set(keys[4] + keys[5])]
    assert [len(epoch) for epoch in epochs] == [8, 8, 8]
    assert not epochs[0] & epochs[1]
    assert epochs[0] == epochs[2]
    alone = Watched()
    make_trainer(make_small(), objective=alone, max_steps=6).train()
    assert keys == alone.__dict__["keys"]


def dismiss_workers(*trainers: RetrieverTrainer) -> None:
    """End the workers now; torch ends them after seconds, when the loader is garbage."""
    for trainer in trainers:
        for loader in trainer.accelerator._dataloaders:
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()


def mixture_of(colours: Any, encoder: Encoder, set_of: Make) -> Mixture:
    parts = [set_of(encoder, colours, 2), set_of(encoder, colours, 2, first_key=1000)]
    return Mixture(parts, [2.0, 1.0], seed=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "ragged epochs": {"per_device_train_batch_size": 3},
    "workers": {"dataloader_num_workers": 2},
    "lasting workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "grad cache and bf16": {"chunk_sizes": SIZES, "bf16": True},
    "logged every 3, saved every 2": {"logging_steps": 3, "save_steps": 2},
    "logged every 3, accumulated": {"logging_steps": 3, "gradient_accumulation_steps": 2},
    "mixture": {},
}


# an epoch has two steps where nothing else is said, a mixture's four: stopped amid one later than
# the first, or between two
@pytest.mark.parametrize(
    ("variant", "stopped"),
    [
        *(("plain", 3), ("plain", 4), ("accumulation", 3), ("ragged epochs", 3)),
        *(("ragged epochs", 4), ("workers", 4), ("lasting workers", 3), ("mixture", 6)),
        *(("grad cache and bf16", 3), ("logged every 3, saved every 2", 4)),
        *(("logged every 3, accumulated", 3), ("mixture", 4)),
    ],
)
def test_resumed_losses_equal_those_without_a_stop(
    make_small: Make,
    make_trainer: Make,
    colours: Any,
    set_of: Make,
    tmp_path: Path,
    variant: str,
    stopped: int,
) -> None:
    """Step for step, with dropout; and the passages are the same."""
    settings = {"save_strategy": "steps", "save_steps": 100, "max_steps": 9, **VARIANTS[variant]}
    settings["warmup_steps"] = 4

    def trainer(directory: str, *callbacks: Any) -> RetrieverTrainer:
        encoder = make_small(0.2)
        chosen = mixture_of(colours, encoder, set_of) if variant == "mixture" else None
        return make_trainer(encoder, tmp_path / directory, callbacks, chosen, Watched(), **settings)

    undisturbed = trainer("one")
    undisturbed.train()
    first = trainer("two", StopAt(stopped))
    begin_output(tmp_path / "two", "run-1")
    first.train()
    found = find_resumption(tmp_path / "two", "true")
    assert found is not None
    assert found.checkpoint == tmp_path / "two" / f"checkpoint-{stopped}"
    torch.manual_seed(99)
    second = trainer("two")
    second.resume(found.checkpoint)
    dismiss_workers(undisturbed, first, second)
    read = [trainer._objective.__dict__["keys"] for trainer in (undisturbed, first, second)]
    assert read[1] + read[2] == read[0]

    def logged(trainer: RetrieverTrainer, name: str) -> dict[int, float]:
        return {e["step"]: e[name] for e in trainer.state.log_history if name in e}

    for name in ("loss", "grad_norm", "learning_rate", "epoch"):
        expected = logged(undisturbed, name)
        assert len(expected) >= 3
        assert logged(second, name) == pytest.approx(expected, rel=1e-6)
    expected_weights = undisturbed._encoder.state_dict()
    for name, value in second._encoder.state_dict().items():
        torch.testing.assert_close(value, expected_weights[name], rtol=1e-6, atol=1e-7)
    mean = "train_loss"
    assert logged(second, mean)[9] == pytest.approx(logged(undisturbed, mean)[9], rel=1e-6)


@pytest.mark.parametrize("steps", [3, 4])
def test_resuming_a_finished_training_does_no_step(
    make_small: Make, make_trainer: Make, tmp_path: Path, steps: int
) -> None:
    """The training had ended within an epoch, or at the end of one."""
    settings = {"save_strategy": "steps", "save_steps": steps, "max_steps": steps}
    first = make_trainer(make_small(0.2), **settings)
    first.train()
    again = make_trainer(make_small(0.2, seed=1), **settings)
    again.resume(tmp_path / f"checkpoint-{steps}")
    assert again.state.global_step == steps
    assert [e["step"] for e in again.state.log_history if "loss" in e] == [*range(1, steps + 1)]
    means = [trainer.state.log_history[-1]["train_loss"] for trainer in (first, again)]
    assert means[1] == pytest.approx(means[0], rel=1e-6)
    for name, value in first._encoder.state_dict().items():
        assert torch.equal(again._encoder.state_dict()[name], value)


def test_resuming_adapters_two_encoders_and_projections(
    make_small: Make, make_trainer: Make, tmp_path: Path
) -> None:
    """All that is trained comes back, and the optimizer's state with it."""
    losses = {}
    for kind in ("undisturbed", "stopped", "resumed"):
        torch.manual_seed(0)
        encoder = with_projection(make_small(0.2), None, 6)
        untie(encoder)
        add_lora(encoder, "base", rank=2, alpha=4, dropout=0.1)
        directory = tmp_path / ("one" if kind == "undisturbed" else "two")
        callbacks = [StopAt(3)] if kind == "stopped" else []
        trainer = make_trainer(
            encoder, directory, callbacks, save_strategy="steps", save_steps=100, max_steps=6
        )
        trainer.resume(directory / "checkpoint-3" if kind == "resumed" else None)
        losses[kind] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses["stopped"] == losses["undisturbed"][:3]
    assert losses["resumed"] == pytest.approx(losses["undisturbed"], rel=1e-6)
    saved = tmp_path / "two" / "checkpoint-6"
    assert {"adapter_model.safetensors", "query"} <= {path.name for path in saved.iterdir()}
    assert (saved / "2_Dense" / "model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()


def test_trainers_own_checkpoints_are_encoder_directories(
    make_small: Make, make_trainer: Make, tmp_path: Path
) -> None:
    encoder: Encoder = make_small()
    make_trainer(encoder, save_strategy="steps", save_steps=2).train()
    saved = load_encoder(tmp_path / "checkpoint-4")
    assert saved.settings == encoder.settings
    for name, value in encoder.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
    assert not list(tmp_path.rglob("*.partial"))


def test_older_checkpoints_are_removed_after_the_new_one_is_complete(
    make_small: Make, make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories: list[list[str]] = []
    from mlflow_dr.training import trainer as module

    mark = module.mark_complete

    def marked(*arguments: Any) -> None:
        directories.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        mark(*arguments)

    monkeypatch.setattr(module, "mark_complete", marked)
    make_trainer(make_small(), save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert directories[2] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert directories[3] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_killed_trainings_leftovers_are_replaced(
    make_small: Make, make_trainer: Make, tmp_path: Path
) -> None:
    left = tmp_path / "checkpoint-2" / "encoder.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    (tmp_path / "checkpoint-2" / "rng_state_7.pth").write_text("of another world size")
    make_trainer(make_small(), save_strategy="steps", save_steps=2, max_steps=2).train()
    assert not left.exists()
    assert not (tmp_path / "checkpoint-2" / "rng_state_7.pth").exists()
    load_encoder(tmp_path / "checkpoint-2")


class FullAt(TrainerCallback):
    """Fills a disk after one step, and empties it after the next."""

    def __init__(self, step: int, disk: Path, left: int) -> None:
        self._step = step
        self._left = left
        self._filler = disk / "filler"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            free = shutil.disk_usage(self._filler.parent).free
            self._filler.write_bytes(bytes(free - self._left))
        else:
            self._filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("what", ["the encoder", "the optimizer"])
def test_a_full_disk_costs_the_checkpoint_not_the_training(
    make_small: Make,
    make_trainer: Make,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """Whatever does not fit any more; safetensors and torch each have an error of their own."""
    encoder = make_small()
    save_encoder(small_disk / "encoder", encoder)
    size = sum(file.stat().st_blocks * 512 for file in (small_disk / "encoder").rglob("*"))
    shutil.rmtree(small_disk / "encoder")
    left = size // 2 if what == "the encoder" else size + 20_000
    trainer = make_trainer(
        encoder,
        small_disk,
        [FullAt(2, small_disk, left)],
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert "checkpoint-2 was not saved, the disk is full" in caplog.text
    (whole,) = small_disk.glob("checkpoint-*")
    assert whole.name == "checkpoint-4"


def test_a_full_disk_keeps_the_older_checkpoint(
    make_small: Make,
    make_trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow_dr.training import trainer as module

    save = module.save_encoder
    saved: list[Path] = []

    def save_once(directory: Path, *arguments: Any, **options: Any) -> None:
        saved.append(directory)
        save(directory, *arguments, **options)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(module, "save_encoder", save_once)
    begin_output(tmp_path, "run-1")
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(make_small(), **options).train()
    assert caplog.text.count("the disk is full") == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    found = find_resumption(tmp_path, "true")
    assert found is not None
    assert found.checkpoint == tmp_path / "checkpoint-1"


def test_another_error_while_saving_ends_the_training(
    make_small: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_dr.training import trainer as module

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "save_encoder", refused)
    with pytest.raises(PermissionError):
        make_trainer(make_small(), save_strategy="steps", save_steps=1).train()


@pytest.mark.parametrize("sizes", [None, SIZES], ids=str)
def test_a_nan_loss_stops_with_its_step_and_queries(
    make_small: Make, make_trainer: Make, sizes: dict[str, int] | None
) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 2:
                next(encoder.parameters()).data.fill_(float("nan"))

    encoder: Encoder = make_small()
    watched: list[list[str]] = []
    trainer = make_trainer(encoder, callbacks=[Broken()], chunk_sizes=sizes)
    collate = collator_of(encoder)

    def noted(groups: Any) -> Any:
        watched.append([group.query_id for group in groups])
        return collate(groups)

    trainer.data_collator = noted
    with pytest.raises(TrainingError, match=r"the loss of step 3 is nan \(queries") as caught:
        trainer.train()
    for name in watched[2]:
        assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "found_at"),
    [
        ({"logging_steps": 4}, 4),
        ({"logging_steps": 10, "save_strategy": "steps", "save_steps": 5}, 5),
        ({"logging_steps": 10, "max_steps": 7}, 7),
    ],
)
def test_losses_are_checked_together_where_one_is_logged_or_saved(
    make_small: Make, make_trainer: Make, tmp_path: Path, settings: dict[str, Any], found_at: int
) -> None:
    """As on a GPU, which would be waited for at each check."""

    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            steps.append(state.global_step)
            if state.global_step == 2:
                next(encoder.parameters()).data.fill_(float("nan"))

    encoder: Encoder = make_small()
    steps: list[int] = []
    trainer = make_trainer(encoder, callbacks=[Broken()], **{"max_steps": 12, **settings})
    trainer.losses = LossCheck(1000)
    with pytest.raises(TrainingError, match=r"the loss of step 3 is nan \(queries"):
        trainer.train()
    assert steps == list(range(1, found_at + 1))
    assert not any(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_has_the_losses_since_the_last_log(
    make_small: Make, make_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(
        make_small(), save_strategy="steps", save_steps=1, logging_steps=3, max_steps=5
    )
    trainer.train()
    notes = {
        step: json.loads((tmp_path / f"checkpoint-{step}/mlflow_dr_progress.json").read_text())
        for step in range(1, 6)
    }
    assert [notes[step]["logged"] for step in range(1, 6)] == [0, 0, 3, 3, 3]
    assert notes[3]["loss"] == 0.0
    assert notes[2]["loss"] > notes[1]["loss"] > 0
    assert notes[5]["total"] == notes[3]["total"] > notes[2]["total"] == 0


def test_a_training_set_without_epochs_is_supported(
    make_small: Make, make_trainer: Make, colours: Any, set_of: Make
) -> None:
    encoder: Encoder = make_small()
    chosen: TrainingSet = set_of(encoder, colours)
    trainer = make_trainer(encoder, training_set=[chosen[index] for index in range(8)])
    trainer.train()
    assert trainer.state.global_step == 4
