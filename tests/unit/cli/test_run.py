"""`mlflow-dr run`, as far as the two processes that it starts."""

from pathlib import Path
from typing import Any

import pytest

from mlflow_dr import launch
from mlflow_dr.cli import run
from mlflow_dr.training.parsing import parse_training


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be launched."""
    calls: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: calls.append(arguments) or 0)
    return calls


def called(*words: object) -> Any:
    return run.command.main([str(word) for word in words], "mlflow-dr", standalone_mode=False)


def test_the_dataset_is_the_flags_else_the_files_else_demo(
    launched: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("dataset: irds:vaswani\nmodel: tiny\n")
    for words in ([], ["--config", file], ["--config", file, "--dataset", "msmarco"]):
        called("--use_cpu", *words)
    trained = [parse_training(training).data.dataset_name for training, *_ in launched]
    assert trained == ["demo", "irds:vaswani", "msmarco"]
