"""What `mkdocs build` makes itself: the home page from README.md, and the reference of all flags.

A page says `<!-- commands -->`, `<!-- training flags -->` or `<!-- recipes -->` where the generated
part belongs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
README_LINKS = re.compile(r"\]\(docs/")
SOURCE_LINKS = re.compile(
    r"\[([^\]]+)\]\((?:CONTRIBUTING|CHANGELOG|CITATION|LICENSE|examples/)[^)]*\)"
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The Markdown of a page, with what is generated put in; called by mkdocs."""
    if page.file.src_uri == "index.md":
        return home()
    for mark, generated in (
        ("<!-- commands -->", command_reference),
        ("<!-- training flags -->", training_reference),
        ("<!-- recipes -->", recipe_files),
    ):
        if mark in markdown:
            markdown = markdown.replace(mark, generated())
    return markdown


def recipe_files() -> str:
    """The recipes of examples/recipes as they are."""
    files = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    parts = [f"## {file.name}\n\n```yaml\n{file.read_text(encoding='utf-8')}```" for file in files]
    return "\n\n".join(parts)


def home() -> str:
    """README.md, with its links as they are from `docs/`."""
    text = README_LINKS.sub("](", (ROOT / "README.md").read_text(encoding="utf-8"))
    return SOURCE_LINKS.sub(r"`\1`", text).replace('src="docs/', 'src="')


def command_reference() -> str:
    """Every command with its help, its example and its flags."""
    from mlflow_dr.cli import COMMANDS, group

    context = click.Context(group, info_name="mlflow-dr")
    parts = []
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        parts += _command_part(name, command)
        if isinstance(command, click.Group):
            for sub, below in command.commands.items():
                parts += _command_part(f"{name} {sub}", below)
    return "\n\n".join(parts)


def _command_part(name: str, command: click.Command) -> Iterable[str]:
    yield f"## mlflow-dr {name}"
    yield from _help(command.help or "")
    rows = [_click_row(param) for param in command.params if isinstance(param, click.Option)]
    if rows:
        yield _table(rows)


def training_reference() -> str:
    """Every flag of `mlflow-dr train`, section by section."""
    from mlflow_dr.training.flag_help import flag_sections

    parts = []
    for title, flags in flag_sections(everything=True).items():
        rows = [
            (_names(flag.names), f"`{flag.default}`" if flag.default else "", flag.meaning)
            for flag in flags
        ]
        parts += [f"## {title}", _table(rows)]
    return "\n\n".join(parts)


def _help(text: str) -> Iterable[str]:
    """The paragraphs of a command's help; the block after `\\b` is its example."""
    prose, _, example = inspect.cleandoc(text).partition("\b\n")
    yield prose.strip()
    if example:
        lines = inspect.cleandoc(example.partition("\n")[2])
        yield f"```bash\n{lines}\n```"


def _click_row(option: click.Option) -> tuple[str, str, str]:
    names = [*option.opts, *option.secondary_opts]
    default = option.default
    if option.is_flag or default is None or not isinstance(default, str | int | float | tuple):
        shown = ""
    else:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return _names(names), f"`{shown}`" if shown else "", option.help or ""


def _names(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for cells in rows:
        shown = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)
