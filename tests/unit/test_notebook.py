"""Python that a page or a notebook shows runs, on a small collection, in this process."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from recipes import ROOT, blocks

from mlflow_dr import launch
from mlflow_dr.cli import group
from mlflow_dr.report.contents import RunReport
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun

EXAMPLES = ROOT / "examples"


@pytest.fixture
def directory(
    client: MlflowClient, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The current directory, with a collection in it; MLflow looks for a store of the tests."""
    shutil.copytree(EXAMPLES / "sea", tmp_path / "sea")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(client.tracking_uri)
    yield tmp_path
    mlflow.set_tracking_uri(before)


def shown_values(code: str, names: dict[str, Any]) -> Iterator[Any]:
    """Run a cell as Jupyter does: yields the value of its last line if that is an expression."""
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    if last is not None:
        yield eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def rises(curve: RunReport) -> bool:
    """Whether the last checkpoint is better than the first by far."""
    values = [values["mrr_at_10"] for values in curve.curves[0].values]
    return values[0] < 0.1 < 0.5 < values[-1]


def test_the_cells_of_the_notebook_run(directory: Path) -> None:
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = [value for cell in cells for value in shown_values(cell, names)]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    assert len(shown) == len(cells) - 1  # but for the cell with the import
    assert rises(names["curve"])
    assert all(value._repr_html_() for value in shown[:-1])


def in_this_process(
    run: TrackedRun, train: launch.Command, validate: launch.Command
) -> tuple[list[launch.Child], bool]:
    """Instead of two processes side by side: train, then validate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUN_VARIABLE, run.id)
        for command in (train, validate):
            group.main([command.name, *command.flags], "mlflow-dr", standalone_mode=False)
    return [], False


def test_the_lines_of_the_readme_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_both", in_this_process)
    (directory / "path" / "to").mkdir(parents=True)
    shutil.move(directory / "sea", directory / "path" / "to" / "beir")
    judged = directory / "path" / "to" / "beir" / "qrels"
    (judged / "dev.tsv").rename(judged / "test.tsv")
    (block,) = blocks(ROOT / "README.md", "python")
    assert len(block.text.splitlines()) < 10
    small = 'model="tiny", recipe="demo", num_train_epochs=3'
    code, count = re.subn('model="[^"]*"', small, block.text)
    assert count == 1
    names: dict[str, Any] = {}
    exec(code, names)
    assert rises(names["curve"])
    assert len(names["curve"].curves[0].steps) == 7
    assert names["model"].encode_query("what").shape == (128,)
