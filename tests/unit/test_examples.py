"""The examples run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mlflow_dr.training.parsing import parse_training

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_file_says_what_the_recipe_says() -> None:
    by_file = parse_training(["--config", str(EXAMPLES / "demo.yaml")])
    by_recipe = parse_training(["--dataset", "demo"])
    assert by_file.model == by_recipe.model
    assert by_file.data == by_recipe.data
    assert by_file.publish == by_recipe.publish
    assert by_file.trainer.to_dict() == by_recipe.trainer.to_dict()


def test_evaluating_from_python(minilm: Path, beir_folder: Callable[..., Path]) -> None:
    folder = beir_folder(
        {"p1": "The lighthouse stands on a rock.", "p2": "Gulls eat fish."},
        {"q1": "what do gulls eat", "q2": "where is the lighthouse"},
        test={"q1": {"p2": 1}, "q2": {"p1": 1}},
    )
    done = subprocess.run(
        [sys.executable, EXAMPLES / "evaluate_from_python.py", minilm, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ndcg@10: 1.0000" in done.stdout
