"""The examples run."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from mlflow import MlflowClient

from mlflow_dr.cli.loaders import loaders_command
from mlflow_dr.cli.options import from_flags
from mlflow_dr.loaders.config import LoadersConfig
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.runs import find_run, is_over
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_file_says_what_the_recipe_says() -> None:
    by_file = parse_training(["--config", str(EXAMPLES / "demo.yaml")])
    by_recipe = parse_training(["--dataset", "demo"])
    assert by_file.model == by_recipe.model
    assert by_file.data == by_recipe.data
    assert by_file.publish == by_recipe.publish
    assert by_file.trainer.to_dict() == by_recipe.trainer.to_dict()


def test_the_sea_is_what_its_generator_writes(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    shutil.copy(EXAMPLES / "sea" / "generate.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "sea" / name).read_bytes()


def test_evaluating_from_python(
    forks: Forks, minilm: Path, beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = beir_folder(
        {"p1": "The lighthouse stands on a rock.", "p2": "Gulls eat fish."},
        {"q1": "what do gulls eat", "q2": "where is the lighthouse"},
        test={"q1": {"p2": 1}, "q2": {"p1": 1}},
    )
    script = EXAMPLES / "evaluate_from_python.py"
    done = forks.call("python", script, minilm, folder, variables={}, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ndcg@10: 1.0000" in done.stdout


@pytest.mark.parametrize("example", ["plain_pytorch_loop.py", "sentence_transformers_trainer.py"])
def test_a_training_loop_of_another_library_is_validated(
    example: str, forks: Forks, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    done = forks.call(
        *("python", "-W", "error::DeprecationWarning:__main__", EXAMPLES / example),
        directory=tmp_path,
        variables={
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "MLFLOW_EXPERIMENT_NAME": client.get_experiment(experiment).name,
        },
    )
    assert done.returncode == 0, done.stderr
    run = find_run(client, done.stdout.rpartition("mlflow-dr validate --run-id ")[2].strip())
    state = run.fetch()
    assert is_over(state)
    assert max(checkpoint.ready_ms for checkpoint in run_checkpoints(run)) <= state.info.end_time
    losses = {"train/loss", "loss"} & set(state.data.metrics)
    assert losses, "the loss is on the same run"

    config = ValidateConfig(measures="mrr@10", device="cpu", dtype="fp32")
    counts = run_validator(FollowedRun(run), config)
    assert (counts.done, counts.failed) == (4, 0)
    points = client.get_metric_history(run.id, "val/mrr_at_10")
    assert sorted(point.step for point in points) == [0, 10, 20, 30]
    assert all(0 < point.value <= 1 for point in points)
    curve = [point.value for point in sorted(points, key=lambda point: point.step)]
    assert curve == sorted(curve), "the curve falls"
    assert curve[0] < 0.1 and curve[-1] > 0.8, curve
    assert len({point.value for point in points}) > 1, "every checkpoint has the same weights"
    assert list(tmp_path.iterdir()) == [], "the example left files behind"


@pytest.mark.parametrize(
    ("small", "studies", "cells"), [("", 4, 12 + 5 + 2 + 2), ("1", 3, 6 + 3 + 2)]
)
def test_the_experiments_of_a_paper_are_studies(
    small: str, studies: int, cells: int, tmp_path: Path
) -> None:
    command = tmp_path / "mlflow-dr"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> calls\n')
    command.chmod(0o755)
    script = EXAMPLES / "moving_stuff_around.sh"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SMALL": small}
    subprocess.run(["sh", script, "--no-log"], check=True, cwd=tmp_path, env=variables)
    lines = (tmp_path / "calls").read_text().splitlines()
    configs = []
    for name, *words in map(shlex.split, lines):
        with loaders_command.make_context(name, words) as context:
            configs.append(from_flags(LoadersConfig, context.params))
    assert len(configs) == studies
    assert sum(len(config.cells) for config in configs) == cells
    assert all(cell.ranker == "cross" for config in configs for cell in config.cells)
    assert all(config.no_log for config in configs)
