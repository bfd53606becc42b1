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
# tests/integration/test_run.py runs a trainer and a validator, test_qa.py both kinds of them,
# tests/unit/cli/test_ui.py the pages
RUN_ELSEWHERE = {"run", "qa", "ui"}
SMALL_TRAINING = [
    *("--model", "tiny", "--max_steps", "2", "--publish_steps", "0", "--publish_initial", "false"),
    *("--p_max_len", "32", "--per_device_train_batch_size", "4", "--token_table", "false"),
]
STEPS = (0, 10, 20)


def lines() -> list[tuple[str, list[str]]]:
    """Location and arguments of each command line that is run here, without duplicates."""
    found: dict[str, tuple[str, list[str]]] = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            if block.note.startswith(PARSED_ONLY):
                continue
            for line in command_lines(block.text):
                argv = project_command(line) if line[:3] == ["mlflow", "run", "."] else line
                if argv[0] == "mlflow-dr" and argv[1] not in RUN_ELSEWHERE:
                    found.setdefault(shlex.join(sorted(argv)), (block.location, argv[1:]))
    return list(found.values())


def small(word: str, names: dict[str, str]) -> str:
    """A word of a recipe with small data and checkpoints that exist."""
    if word.startswith("irds:") or word == "msmarco":
        return "path/to/beir"
    for name, value in names.items():
        word = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", value, word)
    return word


def small_command(argv: list[str], names: dict[str, str]) -> list[str]:
    """A recipe's command line as it is run here, without `mlflow-dr`."""
    experiment = argv.index("--experiment") + 1 if "--experiment" in argv else None
    changed = [
        names["EXPERIMENT"] if index == experiment else small(word, names)
        for index, word in enumerate(argv)
    ]
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


@pytest.fixture
def directory(collection: Path, tiny_directory: Path, tmp_path: Path) -> Path:
    """A directory with the files that the recipes name."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "beir").symlink_to(collection)
    (tmp_path / "my-encoder").symlink_to(tiny_directory)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(tiny_directory, tmp_path / "output" / "checkpoint-1")
    os.utime(tmp_path / "output" / "checkpoint-1", (0, 0))
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if block.note.startswith(FILE):
                text = re.sub(r'msmarco|"irds:[^"]*"', "path/to/beir", block.text)
                (tmp_path / block.note.removeprefix(FILE)).write_text(text)
    return tmp_path


def test_the_recipes_run(
    directory: Path,
    forks: Forks,
    server: str,
    client: MlflowClient,
    publish_noise: Callable[..., str],
) -> None:
    """All recipes run in one directory and on one run, in the order of the pages."""
    experiment = client.create_experiment(str(directory))
    run_id = publish_noise(*STEPS, experiment=experiment)
    (model,) = client.search_logged_models([experiment], max_results=1)
    names = {
        "RUN": run_id,
        "models:/m-0123": f"models:/{model.model_id}",
        "bert-base-uncased": "tiny",
        "EXPERIMENT": str(directory),
    }
    variables = {"MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_ID": experiment}
    failures = []
    for location, argv in lines():
        run = small_command(argv, names)
        done = forks.call("mlflow-dr", *run, variables=variables, directory=directory)
        if done.returncode:
            failures.append(
                f"{location}: mlflow-dr {shlex.join(run)}\n{done.stdout}\n{done.stderr}"
            )
    assert not failures, "\n\n".join(failures)
