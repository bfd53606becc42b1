"""The recipes of README.md and the guides run, on a real server and a small collection."""

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from mlflow import MlflowClient
from recipes import FILE, PARSED_ONLY, ROOT, blocks, command_lines, project_command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
# tests/integration/test_run.py runs a trainer and a validator, tests/unit/cli/test_ui.py the pages
RUN_ELSEWHERE = {"run", "ui"}
SECONDS = 120
SMALL_TRAINING = [
    *("--model", "tiny", "--max_steps", "2", "--publish_steps", "1", "--p_max_len", "32"),
    *("--per_device_train_batch_size", "4", "--token_table", "false"),
]
STEPS = (0, 10)
MORE_STEPS = {"subsets.md": (0, 10, 20)}  # a study of fidelity needs three checkpoints
NEED_FIGURES = {"decisions.md"}  # pages that begin with a run that has been validated


def small(word: str, names: dict[str, str]) -> str:
    """A word of a recipe with small data and checkpoints that exist."""
    if word.startswith("irds:") or word == "msmarco":
        return "path/to/beir"
    for name, value in names.items():
        word = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", value, word)
    return word


def small_command(words: list[str], names: dict[str, str]) -> list[str]:
    """A recipe's command line as it is run here, without `mlflow-dr`."""
    experiment = words.index("--experiment") + 1 if "--experiment" in words else None
    changed = [
        names["EXPERIMENT"] if place == experiment else small(word, names)
        for place, word in enumerate(words)
    ][1:]
    if changed[0] == "train":
        changed += SMALL_TRAINING
        changed += ["--train_n_passages", "2" if "--train_dir" in changed else "1"]
        changed += ["--save_steps", "1"] if "--save_steps" in changed else []
        if "--resume_from_checkpoint" in changed:  # last, so that no flag is taken for its value
            changed.remove("--resume_from_checkpoint")
            changed.append("--resume_from_checkpoint")
    if changed[0] == "validate" and {"--experiment", "--checkpoints-dir"} & set(changed):
        changed += [] if "--once" in changed else ["--once"]
    return changed


def lines_of(page: Path) -> list[tuple[str, list[str]]]:
    """Place and words of each command line of a page that is run here."""
    return [
        (block.place, words)
        for block in blocks(page, "bash")
        if not block.note.startswith(PARSED_ONLY)
        for words in map(called, command_lines(block.text))
        if words[0] == "mlflow-dr" and words[1] not in RUN_ELSEWHERE
    ]


def is_repeated(page: Path, words: list[str]) -> bool:
    """Whether an earlier page has the same validation."""
    earlier = PAGES[: PAGES.index(page)]
    return words[1] == "validate" and any(
        set(words) <= set(line) for other in earlier for _, line in lines_of(other)
    )


@pytest.fixture
def page_directory(collection: Path, tiny_directory: Path, tmp_path: Path) -> Path:
    """A directory with what the recipes name."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "beir").symlink_to(collection)
    (tmp_path / "my-encoder").symlink_to(tiny_directory)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for step in (1, 2, 3):
        shutil.copytree(tiny_directory, tmp_path / "output" / f"checkpoint-{step}")
        os.utime(tmp_path / "output" / f"checkpoint-{step}", (0, 0))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipes_of_a_page_run(
    page: Path,
    page_directory: Path,
    forks: Forks,
    server: str,
    client: MlflowClient,
    publish_noise: Callable[..., str],
) -> None:
    for block in blocks(page, "yaml"):
        if block.note.startswith(FILE):
            text = "\n".join(small_yaml(line) for line in block.text.splitlines())
            (page_directory / block.note.removeprefix(FILE)).write_text(text)
    commands = [(place, words) for place, words in lines_of(page) if not is_repeated(page, words)]
    if not commands:
        return
    if page.name in NEED_FIGURES:
        commands.insert(0, (page.name, ["mlflow-dr", "validate", "--run-id", "RUN"]))
    experiment = client.create_experiment(str(page_directory))
    run_id = publish_noise(*MORE_STEPS.get(page.name, STEPS), experiment=experiment)
    (model,) = client.search_logged_models([experiment], max_results=1)
    names = {
        "RUN": run_id,
        "models:/m-0123": f"models:/{model.model_id}",
        "bert-base-uncased": "tiny",
        "EXPERIMENT": str(page_directory),
    }
    for place, words in commands:
        run = small_command(words, names)
        done = forks.call(
            *run,
            variables={"MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_ID": experiment},
            directory=page_directory,
            timeout=SECONDS,
        )
        shown = f"{place}: mlflow-dr {shlex.join(run)}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, shown


def called(words: list[str]) -> list[str]:
    """What a command line calls; of a project, its command."""
    return project_command(words) if words[:3] == ["mlflow", "run", "."] else words


def small_yaml(line: str) -> str:
    """A line of a file of validations with a small collection."""
    return re.sub(r'msmarco|"irds:[^"]*"', "path/to/beir", line)
