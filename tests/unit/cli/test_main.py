"""What ends the command line, and how it says so."""

import subprocess
import sys

import pytest

from mlflow_dr import cli
from mlflow_dr.cli.collections import datasets_command


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


MODULES_OF_COMMANDS = ("collections", "evaluate", "runs", "train", "validate")


def test_the_help_of_a_command_needs_neither_torch_nor_mlflow() -> None:
    names = ", ".join(f"mlflow_dr.cli.{name}" for name in MODULES_OF_COMMANDS)
    code = f"import sys, {names}; print({{'torch', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
