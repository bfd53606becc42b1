"""The names of all training flags, read without importing torch or transformers.

A mistyped flag is refused within a second this way; importing what the flags belong to takes five.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mlflow_dr.errors import UsageError
from mlflow_dr.training.ranges import check_choices

OWN_SOURCES = ("arguments.py", "gc_dpr.py")
THEIR_CLASS = "TrainingArguments"
ALWAYS_THERE = ("--config", "--help", "-h")
HELP = "`mlflow-dr train --help` lists all"


def flag(default: Any, help: str, *aliases: str, **options: Any) -> Any:
    """A field that HfArgumentParser makes a flag of; each alias with dashes or underscores."""
    spellings = dict.fromkeys(s for name in aliases for s in (name, dashed(name)))
    return field(default=default, metadata={"help": help, "aliases": list(spellings), **options})


def dashed(name: str) -> str:
    """A flag's name with dashes where it has underscores."""
    return "--" + name.removeprefix("--").replace("_", "-")


def check_flags(words: Sequence[str], others: Iterable[str] = ()) -> None:
    """Refuse unknown flags and unknown words of closed choices, before anything is imported.

    Args:
        words: the flags of `mlflow-dr train`; with `--config FILE`, those in the file, too.
        others: names of flags that the command has besides, to be suggested.

    Raises:
        UsageError: a flag is unknown or has a value that it does not take; or the file of flags
            cannot be read.
    """
    known = known_flags()
    if not known:
        return
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name != "--" and name not in known:
            raise UsageError(unknown_flag(name, [*known, *others]))
    for name, value in values_of(words):
        field_name = name.removeprefix("--").replace("-", "_")
        check_choices({field_name: value}, {field_name: name}.__getitem__)
        if name == "--config":
            read_flags(Path(value), known)


def values_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The flags among words that are followed by a value, as they are typed, and the value."""
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif position + 1 < len(words) and not words[position + 1].startswith("--"):
            yield name, words[position + 1]


def read_flags(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Flags and values of a YAML or JSON file; the names begin with `--` and have underscores.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or has an unknown flag.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: expected flags and values, got {type(values).__name__}")
    names = {key: f"--{str(key).replace('-', '_')}" for key in values}
    for name in names.values():
        if name not in known or name in ALWAYS_THERE:
            raise UsageError(f"{path}: {unknown_flag(name, known)}")
    return {names[key]: value for key, value in values.items()}


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """What is said of an unknown flag, with the known one that is most like it."""
    name = word.split("=", 1)[0][:80]
    spelled = name.replace("-", "_").replace("__", "--", 1)
    close = difflib.get_close_matches(spelled, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"no flag {name}{hint} {HELP}"


@cache
def known_flags() -> frozenset[str]:
    """Every spelling of every training flag; empty where transformers' source is not found."""
    package = importlib.util.find_spec("transformers")
    places = (package and package.submodule_search_locations) or []
    theirs = [Path(place) / "training_args.py" for place in places]
    if not theirs or not theirs[0].is_file():
        return frozenset()
    files = [theirs[0], *(Path(__file__).with_name(name) for name in OWN_SOURCES)]
    found: dict[str, ast.expr | None] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found |= _fields(node, named=node.name == THEIR_CLASS)
    names = {spelling for name, value in found.items() for spelling in _spellings(name, value)}
    return frozenset({*names, *ALWAYS_THERE})


def _fields(node: ast.ClassDef, named: bool) -> dict[str, ast.expr | None]:
    """The fields of a dataclass that are flags: all of transformers', and what `flag` makes."""
    return {
        line.target.id: line.value
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if named or _is_call(line.value, "flag")
    }


def _spellings(name: str, value: ast.expr | None) -> Iterator[str]:
    yield from (f"--{name}", dashed(name))
    default = value
    if isinstance(value, ast.Call):
        strings = (node.value for node in value.args[2:] if isinstance(node, ast.Constant))
        for alias in strings if _is_call(value, "flag") else ():
            yield from (str(alias), dashed(str(alias)))
        named = [word.value for word in value.keywords if word.arg == "default"]
        default = next(iter([*named, *value.args[:1]]), None)
    if isinstance(default, ast.Constant) and default.value is True:  # HfArgumentParser's opposite
        yield from (f"--no_{name}", f"--no-{name.replace('_', '-')}")


def _is_call(value: ast.expr | None, name: str) -> bool:
    return (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == name
    )
