"""Starting and ending a trainer and a validator; the whole of it is in tests/integration."""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mlflow_dr import launch
from mlflow_dr.errors import ChildError, UsageError
from mlflow_dr.launch import SECONDS_TO_STOP, Child, Command, _checked_training, _signal, _Stop
from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.resume import begin_output, claimed_output
from mlflow_dr.validation.config import RunConfig

TINY = ("--model", "tiny", "--use_cpu")
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
PARENT = f"""
import subprocess, sys, time
argv = [sys.executable, "-c", {STUBBORN!r}]
print(*(subprocess.Popen(argv, start_new_session=own).pid for own in (True, False)), flush=True)
time.sleep(600)
"""


def test_killing_a_child_kills_its_own_children() -> None:
    """As torchrun does: in a session of its own. And what is in the child's."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    try:
        _signal([Child("train", process, threading.Thread())], signal.SIGKILL)
        assert process.wait(timeout=120) == -signal.SIGKILL
        deadline = time.monotonic() + 120
        while any(map(_lives, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(_lives, workers))
    finally:
        for running in (process, *filter(_lives, workers)):
            running.kill()
        process.stdout.close()
        process.wait()


def _lives(process: psutil.Process) -> bool:
    """Whether the process is running; a finished process that nobody has waited for is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_trainer_and_a_validator_may_be_started_in_any_thread() -> None:
    before = signal.getsignal(signal.SIGINT)

    def start() -> object:
        with _Stop() as stop:
            return stop.received

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(start).result() is None
    assert signal.getsignal(signal.SIGINT) is before


def test_torchrun_waits_for_its_children_as_long_as_we_do(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The timeout is read the way torch reads its environment."""
    printing = (
        "from torch.distributed.launcher.api import LaunchConfig as C; "
        "print(getattr(C(1, 1, 1), 'shutdown_timeout', 'unknown'))"
    )
    monkeypatch.setattr(launch, "TORCHRUN", ("-c", printing))
    child = Child.start(Command("train", [], {}, processes=2), run)
    with child.process:
        child.reader.join(timeout=600)
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("[train] ")
    if last == "unknown":
        pytest.skip("this torch waits for half a minute")
    assert float(last) == SECONDS_TO_STOP


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("sys.exit('error: no such encoder')", "exit code 1"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_a_childs_error_is_printed_once(
    run: TrackedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ending: str,
    how: str,
) -> None:
    code = f"import os, sys; print('begun', flush=True); {ending}"
    monkeypatch.setattr(launch, "TORCHRUN", ("-c", code))
    child = Child.start(Command("train", [], {}, processes=2), run)
    with child.process:
        child.reader.join(timeout=600)
    child.report_death()
    child.report_death()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[train] begun"
    assert lines[-1] == f"train ended with {how}"
    assert sum("no such encoder" in line for line in lines) == (how == "exit code 1")


@pytest.mark.parametrize("gpus", [1, 4])
def test_negatives_across_devices_are_checked_with_the_future_number_of_processes(
    beir_folder: Callable[..., Path],
    tmp_path: Path,
    gpus: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, train={"q": {"p": 1}}, dev={"q": {"p": 1}})
    flags = ["--dataset", str(folder), "--negatives_x_device", *TINY]
    with caplog.at_level(logging.WARNING, "mlflow_dr"):
        plan = _checked_training([*flags, "--output_dir", str(tmp_path / "out")], gpus)
    assert plan[1:] == (str(folder), None)
    assert ("there is one training process" in caplog.text) == (gpus == 1)


def test_an_encoder_that_does_not_exist_is_refused_before_there_is_a_run(
    beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, train={"q": {"p": 1}}, dev={"q": {"p": 1}})
    flags = ["--dataset", str(folder), "--use_cpu", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=r"nowhere: not a directory"):
        _checked_training([*flags, "--model", str(tmp_path / "nowhere")], 1)


def test_an_output_directory_in_use_is_refused_before_there_is_a_run(
    beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that is resumed twice would be ended for the training that has it."""
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, train={"q": {"p": 1}}, dev={"q": {"p": 1}})
    flags = ["--dataset", str(folder), *TINY, "--output_dir", str(tmp_path / "out")]
    with claimed_output(tmp_path / "out", None, saves=True):
        assert _checked_training(flags, 1)[2] is None
        with pytest.raises(UsageError, match="another training"):
            _checked_training([*flags, "--save_steps", "2"], 1)
    begin_output(tmp_path / "out", "run-1")
    (tmp_path / "out" / "checkpoint-2").mkdir()
    with pytest.raises(UsageError, match="has checkpoints of another training"):
        _checked_training([*flags, "--save_steps", "2"], 1)
    resumed = [*flags, "--resume_from_checkpoint"]
    assert _checked_training(resumed, 1)[2] == "run-1"
    with (
        claimed_output(tmp_path / "out", None, saves=True, overwrite=True),
        pytest.raises(UsageError, match="another training"),
    ):
        _checked_training(resumed, 1)


def test_a_run_that_the_trainer_refuses_to_resume_stays_as_it_was(
    run: TrackedRun,
    beir_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.finish("FINISHED")
    before = run.fetch().info
    begin_output(tmp_path, run.id)
    refused = SimpleNamespace(command="train", code=UsageError.exit_code, failed=True)
    monkeypatch.setattr(launch, "run_both", lambda *_: ([refused], False))
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, train={"q": {"p": 1}}, dev={"q": {"p": 1}})
    flags = ["--dataset", str(folder), *TINY, "--output_dir", str(tmp_path)]
    config = RunConfig(tracking_uri=tracking_uri())
    with pytest.raises(ChildError, match="train ended with an error"):
        launch.launch(config, [*flags, "--resume_from_checkpoint"])
    after = run.fetch().info
    assert (after.status, after.end_time) == (before.status, before.end_time)
