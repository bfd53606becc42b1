"""What ends the command line, and how it says so."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlflow_dr import cli
from mlflow_dr.cli.collections import datasets_command
from mlflow_dr.cli.train import train_command


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (EOFError("No data left"), 1, "error: what was read ended too early (EOFError: No data"),
    ],
)
def test_only_an_interrupt_exits_as_stopped(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fails() -> None:
        raise raised

    monkeypatch.setattr(datasets_command, "callback", fails)
    monkeypatch.setattr("sys.argv", ["mlflow-dr", "datasets"])
    assert cli._run() == code
    assert message in capsys.readouterr().err


def test_the_help_of_train_has_the_usual_flags_and_help_all_has_all() -> None:
    usual, everything = (
        CliRunner().invoke(train_command, [flag]).output for flag in ("--help", "--help-all")
    )
    others = ("--val_av_rank_bsz", "--fsdp", "--do_train")
    for flag in ("--temperature", "--batch_size", "--learning_rate"):
        assert flag in usual.split()
    assert "[default: 0.0]" in usual  # of --distil_weight
    assert not [flag for flag in others if flag in usual.split()]
    assert not [flag for flag in others if flag not in everything.split()]
    assert everything.startswith(usual.rstrip())


MODULES_OF_COMMANDS = ("collections", "evaluate", "runs", "train", "validate")


def test_the_help_of_a_command_needs_neither_torch_nor_mlflow() -> None:
    names = ", ".join(f"mlflow_dr.cli.{name}" for name in MODULES_OF_COMMANDS)
    code = f"import sys, {names}; print({{'torch', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
