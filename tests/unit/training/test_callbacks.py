"""What is written at each step, and how training is asked to stop."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import TrainerControl, TrainerState, TrainingArguments

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.training.callbacks import (
    MetricCallback,
    ScheduledPublishing,
    StopCallback,
    every_steps,
)

Written = list[tuple[int, Mapping[str, float]]]
Make = Callable[..., Any]


def publishing(every: int, initial: bool = False) -> tuple[list[int], ScheduledPublishing]:
    """The published steps, and the publisher that records them."""
    steps: list[int] = []
    return steps, ScheduledPublishing(steps.append, every_steps(every), initial)


def writing(last_step: int | None = None) -> tuple[Written, MetricCallback]:
    written: Written = []
    return written, MetricCallback(lambda values, step: written.append((step, values)), last_step)


def test_each_logged_step_is_one_point(make_small: Make, make_trainer: Make) -> None:
    written, callback = writing()
    make_trainer(make_small(), callbacks=[callback], max_steps=7, logging_steps=3).train()
    assert [step for step, values in written if "train/loss" in values] == [3, 6]
    assert all("train/learning_rate" in values for _, values in written[:2])
    assert all("train/grad_norm" in values for _, values in written[:2])


def test_the_summary_is_not_a_point_of_the_curves(make_small: Make, make_trainer: Make) -> None:
    written, callback = writing()
    summaries: list[Mapping[str, float]] = []
    callback._summarise = summaries.append
    make_trainer(make_small(), callbacks=[callback]).train()
    (summary,) = summaries
    assert {"mean_loss", "runtime", "samples_per_second", "steps_per_second"} == summary.keys()
    metrics = {name for _, values in written for name in values}
    assert not {"train/train_loss", "train/mean_loss", "train/runtime"} & metrics
    epochs = [step for step, values in written if "train/epoch" in values]
    assert epochs == sorted(set(epochs))


def log(callback: MetricCallback, step: int, **values: float) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=True)
    callback.on_log(TrainingArguments(use_cpu=True), state, TrainerControl(), values)


def test_a_resumed_training_writes_no_metric_twice() -> None:
    written, callback = writing(last_step=4)
    for step in (3, 4, 5):
        log(callback, step, loss=1.0)
    assert written == [(5, {"train/loss": 1.0})]


def test_metrics_lost_by_a_kill_are_written_when_training_resumes() -> None:
    """From the checkpoint, which has the figures of the steps before it."""
    written, callback = writing(last_step=2)
    history = [{"loss": float(step), "epoch": 0.5, "step": step} for step in range(1, 5)]
    history.append({"train_loss": 1.0, "epoch": 0.5, "step": 4})
    state = TrainerState(global_step=4, is_world_process_zero=True, log_history=history)
    callback.on_train_begin(TrainingArguments(use_cpu=True), state, TrainerControl())
    assert written == [
        (3, {"train/loss": 3.0, "train/epoch": 0.5}),
        (4, {"train/loss": 4.0, "train/epoch": 0.5}),
    ]


def test_infinite_metrics_are_not_written() -> None:
    """MLflow's sqlite store takes NaN, other stores do not."""
    written, callback = writing()
    log(callback, 1, loss=1.0, grad_norm=math.nan)
    assert written == [(1, {"train/loss": 1.0})]


def test_other_processes_write_nothing() -> None:
    written, callback = writing()
    state = TrainerState(global_step=1, is_world_process_zero=False)
    callback.on_log(TrainingArguments(use_cpu=True), state, TrainerControl(), {"loss": 1.0})
    assert written == []


@pytest.mark.parametrize(
    ("every", "initial", "steps"),
    [(3, True, [0, 3, 4]), (2, False, [2, 4]), (0, False, [4]), (0, True, [0, 4])],
)
def test_checkpoints_before_during_and_at_the_end(
    make_small: Make, make_trainer: Make, every: int, initial: bool, steps: list[int]
) -> None:
    published, callback = publishing(every, initial)
    make_trainer(make_small(), callbacks=[callback]).train()
    assert published == steps


@pytest.mark.parametrize("saving", [True, False])
def test_a_stop_request_ends_training_after_the_step(
    make_small: Make, make_trainer: Make, tmp_path: Path, saving: bool
) -> None:
    """With its encoder published, and where training saves, with something to resume from."""
    stop = StopCallback()
    stop.ask("test")
    published, callback = publishing(0)
    strategy = {"save_strategy": "steps", "save_steps": 100} if saving else {}
    encoder: Encoder = make_small()
    make_trainer(encoder, callbacks=[callback, stop], **strategy).train()
    assert published == [1]
    saved = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert saved == (["checkpoint-1"] if saving else [])
    assert stop.reason == "test"


@pytest.mark.parametrize(("killed", "highest"), [(False, 1.0), (True, 2.0)])
def test_several_processes_stop_after_the_same_step(
    monkeypatch: pytest.MonkeyPatch, killed: bool, highest: float
) -> None:
    """One of two is asked during step 2; both know it after step 3, of which no answer is used."""
    stops, answers = [StopCallback(), StopCallback()], list[list[torch.Tensor]]()
    arguments = SimpleNamespace(world_size=2, device=torch.device("cpu"), save_strategy="no")

    def reduce(tensor: torch.Tensor, _: Any) -> None:
        """Both say something before one answer is read."""
        answers[-1].append(tensor)
        for each in answers[-1]:
            each.copy_(torch.stack(answers[-1]).max())

    monkeypatch.setattr(distributed, "all_reduce", reduce)
    ended = []
    for step in (1, 2, 3):
        answers.append([])
        if step == 2:
            stops[1].ask("signal", killed)
        for number, stop in enumerate(stops):
            control = TrainerControl()
            stop.on_step_end(arguments, TrainerState(), control)
            ended += [(step, number)] if control.should_training_stop else []
    assert ended == [(3, 0), (3, 1)]
    assert float(answers[1][0]) == highest
    assert [stop.reason for stop in stops] == ["another process was asked to stop", "signal"]
    assert [stop.killed for stop in stops] == [killed, killed]
