"""The recipes of examples/recipes parse, and their comments are complete."""

from pathlib import Path

import pytest
from recipes import ROOT, check_command

from benchmarks.recipes import ORDER, RECIPES, Recipe, read_recipe, small_commands
from mlflow_dr.cli.options import from_flags
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.validation.config import ValidateConfig

FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return read_recipe(request.param)


def test_the_flags_of_a_recipe_parse(recipe: Recipe) -> None:
    path = RECIPES / f"{recipe.name}.yaml"
    if "model" in recipe.flags:
        parse_training(["--config", str(path), "--use_cpu"])
    else:
        from_flags(ValidateConfig, {"run_id": "0"}, path)


def test_the_commands_of_a_recipe_parse(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = [
        command for command in recipe.commands if f"examples/recipes/{recipe.name}.yaml" in command
    ]
    assert len(named) == 1
    for command in recipe.commands:
        check_command(list(command))


def test_a_recipe_says_what_to_expect_and_whether_it_was_run(recipe: Recipe) -> None:
    assert {"expected", "cost", "source"} <= recipe.notes.keys()
    is_run = recipe.name in ORDER
    assert ("held" in recipe.notes) == is_run
    assert is_run or "not run here" in recipe.notes["source"]
    assert not is_run or "benchmarks/recipes.py runs it" in recipe.notes["source"]


def test_a_recipe_is_run_with_what_is_here(tmp_path: Path, minilm: Path) -> None:
    for name in ORDER:
        for command in small_commands(read_recipe(RECIPES / f"{name}.yaml"), tmp_path):
            check_command(["mlflow-dr", *command[3:]])
