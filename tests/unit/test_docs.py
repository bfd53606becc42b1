"""What the pages say exists: commands, flags, names, functions."""

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from recipes import PAGES, ROOT, Block, blocks, check_command, check_ours, command_lines

import mlflow_dr
from mlflow_dr.cli import COMMANDS, group
from mlflow_dr.retrieval.measures import LIBRARY_NAMES
from mlflow_dr.validation.config import ValidationDefaults

PACKAGE = Path(mlflow_dr.__file__).parent
WRITTEN = re.compile(r'"(mlflow_dr\.(?!json")[a-z_.]+)"')
ENTRY_POINT_GROUPS = {
    f"mlflow_dr.{kind}"
    for kind in (
        *("dataset_formats", "subset_strategies", "losses", "search_backends"),
        "document_stores",
    )
}
BASH = [block for page in PAGES for block in blocks(page, "bash")]
EXAMPLE = re.compile(r"^ *Example:\n((?: +\S.*\n?)+)", re.M)


@pytest.fixture(scope="module")
def build_hook() -> ModuleType:
    """docs/build_hook.py, which makes the reference."""
    spec = importlib.util.spec_from_file_location("build_hook", ROOT / "docs" / "build_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the examples and files that a pattern has to find."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("nq-train-1.json", "nq-dev.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_named(name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_the_reference(name: str, build_hook: ModuleType) -> None:
    section = build_hook.command_reference().split(f"## mlflow-dr {name}\n")[1].split("\n## ")[0]
    for option in command_named(name).params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"
            for flag in (*option.opts, *option.secondary_opts):
                assert f"`{flag}`" in section, f"{name} {flag}"


def test_every_flag_of_training_is_in_the_reference(build_hook: ModuleType) -> None:
    from mlflow_dr.training.parsing import training_parser

    reference = build_hook.training_reference()
    for action in training_parser()._actions:
        named = [flag for flag in action.option_strings if f"`{flag}`" in reference]
        spelled = {flag.replace("-", "_") for flag in named}
        missing = [flag for flag in action.option_strings if flag.replace("-", "_") not in spelled]
        assert not missing, missing


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_each_help_has_an_example_that_parses(argv: list[str], directory: Path) -> None:
    shown = CliRunner().invoke(group, [*argv, "--help"]).output
    example = EXAMPLE.search(shown)
    assert example, f"no example in mlflow-dr {shlex.join([*argv, '--help'])}"
    for command in command_lines(inspect.cleandoc(example[1])):
        assert command[:1] + command[1 : 1 + len(argv)] == ["mlflow-dr", *argv]
        check_ours(command[1:])


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.location)
def test_each_recipe_parses(block: Block, directory: Path) -> None:
    for argv in command_lines(block.text):
        try:
            check_command(argv)
        except Exception as error:
            raise AssertionError(f"{block.location}: {shlex.join(argv)}: {error}") from error


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page, "python")],
    ids=lambda block: block.location,
)
def test_python_in_the_pages_is_python(block: Block) -> None:
    ast.parse(block.text)


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in mlflow_dr.__all__ if f"::: mlflow_dr.{name}\n" not in page]
    assert not missing


def test_every_name_that_is_written_to_mlflow_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "written.md").read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py"):
        for name in WRITTEN.findall(path.read_text(encoding="utf-8")):
            if not is_module(name) and name not in ENTRY_POINT_GROUPS:
                assert f"`{name}" in page, f"{path.name}: {name}"


def is_module(name: str) -> bool:
    """Whether this is the name of a part of the package, not of a tag or param."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("name", LIBRARY_NAMES)
def test_every_measure_is_in_the_reference(name: str) -> None:
    page = (ROOT / "docs" / "reference" / "measures.md").read_text(encoding="utf-8")
    assert f"`{name}@k`" in page


def test_every_key_of_a_validation_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "collections.md").read_text(encoding="utf-8")
    missing = [name for name in ValidationDefaults.model_fields if f"`{name}`" not in page]
    assert not missing
