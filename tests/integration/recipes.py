"""The recipes of README.md and docs/: fenced bash blocks, and how each command line is parsed."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^>]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
EXTRAS = re.compile(r"\.\[([\w,]+)\]|mlflow_dr\[([\w,]+)\]")
PARSED_ONLY = "parsed only: "
FILE = "file: "


class Block(NamedTuple):
    """A fenced block of a page; `note` is the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def location(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a page in this language."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if match["language"] == language]
    lines = [text.count("\n", 0, match.start()) + 1 for match in found]
    return [
        Block(page, line, language, match["text"], match["note"] or "")
        for line, match in zip(lines, found, strict=True)
    ]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        if argv := shlex.split(line, comments=True):
            yield argv


def project_command(argv: list[str]) -> list[str]:
    """The command that `mlflow run . ...` calls, read from the MLproject file."""
    entry, given = "main", {}
    rest = iter(argv[3:])
    for word in rest:
        if word == "-e":
            entry = next(rest)
        elif word == "-P":
            key, _, value = next(rest).partition("=")
            given[key] = value
        else:
            assert word == "--env-manager" and next(rest) == "local", word
    project = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
    point = project["entry_points"][entry]
    declared = point.get("parameters", {})
    values = {name: str(about.get("default", "")) for name, about in declared.items()} | given
    called = shlex.split(point["command"])
    called = [word.format_map(values) for word in called]
    extra = {name: value for name, value in given.items() if name not in declared}
    return called + [word for name, value in extra.items() for word in (f"--{name}", value)]


def check_command(argv: list[str]) -> None:
    """Parse a command line without running it.

    Raises:
        Exception: it does not parse.
    """
    match argv:
        case ["mlflow-dr", *rest]:
            check_ours(rest)
        case ["mlflow", "run", ".", *_]:
            check_command(project_command(argv))
        case ["torchrun", *flags]:
            from torch.distributed.run import get_args_parser

            parsed = get_args_parser().parse_args(flags)
            assert parsed.module and parsed.training_script == "mlflow_dr", argv
            check_ours(parsed.training_script_args)
        case ["make", *goals]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for goal in goals:
                assert "=" in goal or re.search(rf"^{goal}:", makefile, re.M), f"make {goal}"
        case ["pip", "install", *rest]:
            check_extras(rest)
        case ["python", "-m", module, *rest]:
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            for flag in (word for word in rest if word.startswith("--")):
                assert f'"{flag}"' in source, f"{module} has no {flag}"
        case ["python", script, *_] | [_, "sh", script, *_]:
            assert (ROOT / script).is_file(), script
        case ["mlflow", "models", "serve", *_] | ["curl", *_] | ["pre-commit", *_]:
            pass
        case [script]:
            assert (ROOT / script).is_file(), script
        case _:
            raise AssertionError(f"how is this checked? {shlex.join(argv)}")


def check_extras(argv: list[str]) -> None:
    """Check that the extras and files that pip is given exist."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in argv:
        if found := EXTRAS.search(word):
            names = (found[1] or found[2]).split(",")
            assert set(names) <= set(project["optional-dependencies"]), word
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), word


def check_ours(argv: list[str]) -> None:
    """Parse the words after `mlflow-dr`; files that a recipe names need not exist."""
    from mlflow_dr.cli import group
    from mlflow_dr.training.flags import check_flags
    from mlflow_dr.training.parsing import parse_training

    name, *rest = argv
    if name in ("train", "jax-train"):
        parse_training(rest if name == "train" else ["--engine", "jax", *rest])
        return
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"mlflow-dr {name}"
    if isinstance(command, click.Group) and rest:
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        with command.make_context(name, rest) as context:
            if name in ("run", "qa"):
                check_flags(context.params["trainer_flags"])
    except click.BadParameter as error:
        if "does not exist" not in error.format_message():
            raise
