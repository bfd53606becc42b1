"""What is said about the disk before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training import disk_use
from mlflow_dr.training.callbacks import every_steps
from mlflow_dr.training.disk_use import DiskUse


@pytest.fixture
def said(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> Any:
    """What is said at the begin of a training, by its flags, free bytes and first step."""
    model = torch.nn.Linear(249, 1000)  # 1 MB

    def said(free: float = 77e9, begin: int = 0, initial: bool = True, **flags: Any) -> list[str]:
        caplog.clear()
        monkeypatch.setattr(disk_use, "_free", lambda folder: free)
        arguments = TrainingArguments(str(tmp_path / "outputs"), use_cpu=True, **flags)
        state = TrainerState(global_step=begin, max_steps=10, save_steps=4)
        callback = DiskUse(run, 10**6, every_steps(4), initial)
        callback.on_train_begin(arguments, state, TrainerControl(), model=model)
        return [record.getMessage() for record in caplog.records]

    caplog.set_level("INFO", logger="mlflow_dr")
    return said


def test_all_published_checkpoints_are_counted(said: Any) -> None:
    (line,) = said(save_strategy="no")
    assert line.startswith("4 checkpoints of 1.0 MB each will be published: 4.0 MB in ")
    assert line.endswith(", where 77.0 GB are free")
    assert said(save_strategy="no", initial=False)[0].startswith("3 checkpoints")
    assert said(save_strategy="no", begin=8)[0].startswith("1 checkpoint will be published: 1.0 MB")


def test_checkpoints_to_resume_from_have_the_moments_too(said: Any, tmp_path: Path) -> None:
    _, line = said(save_strategy="steps")
    text = "3 checkpoints of 3.0 MB each will be saved to resume from: 9.0 MB in "
    assert line.startswith(f"{text}{tmp_path}/outputs")
    assert said(save_strategy="steps", save_total_limit=2)[1].startswith("2 checkpoints")
    assert said(save_strategy="epoch", num_train_epochs=5)[1].startswith("5 checkpoints")


def test_too_little_room_is_a_warning(said: Any) -> None:
    *_, line = said(free=12e6, save_strategy="steps")
    assert line.startswith("checkpoints need 13.0 MB on the disk of ")
    assert "`mlflow-dr validate --keep best:3,last:2`" in line
    assert len(said(free=12e6, save_strategy="no")) == 1


def test_a_store_elsewhere_has_no_disk(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_use, "local_directory", lambda location: None)
    assert said(free=1, save_strategy="no") == [
        "4 checkpoints of 1.0 MB each will be published: 4.0 MB"
    ]
