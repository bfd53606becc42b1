"""Validations as they are on one run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.resolve import named_data


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> Path:
    return beir_folder({"p": "gulls"}, {"q": "what flies"}, dev={"q": {"p": 1}})


def test_the_split_of_the_run_applies_only_to_its_dataset(
    run: TrackedRun, folder: Path, beir_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = beir_folder({"p": "kelp"}, {"q": "what grows"}, "other", test={"q": {"p": 1}})
    run.log_params({"dataset": str(folder), "validation_split": "dev"})
    monkeypatch.chdir(folder.parent)
    assert named_data(run, None, None) == (str(folder), "dev")
    assert named_data(run, str(folder), None) == (str(folder), "dev")
    assert named_data(run, folder.name, None) == (folder.name, "dev")
    assert named_data(run, folder.name, "test") == (folder.name, "test")
    assert named_data(run, str(other), None) == (str(other), None)
    with pytest.raises(UsageError, match="no dataset 'nowhere'"):
        named_data(run, "nowhere", None)


def test_a_split_of_a_run_without_a_dataset_is_ignored(run: TrackedRun, folder: Path) -> None:
    run.log_params({"validation_split": "0.1"})
    assert named_data(run, str(folder), None) == (str(folder), None)
    with pytest.raises(UsageError, match="names no dataset"):
        named_data(run, None, None)
