"""The glossary and the journeys name files, classes and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

import mlflow_dr

PACKAGE = Path(mlflow_dr.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
NAMED = re.compile(r"`((?:\w+/)*\w+\.py)(?:: ([\w.]+))?`")
JOURNEY = re.compile(r"^\d+\. `(\w[\w/]*\.py): ([\w.]+)`", re.M)


def named(page: str) -> set[tuple[str, str]]:
    """File and name of everything that a page names."""
    return set(NAMED.findall((DOCS / page).read_text(encoding="utf-8")))


def names_in(path: Path) -> set[str]:
    """What a file defines at its top, and `Class.method` of its classes."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=body):
                names.add(name)
                names |= {f"{name}.{part.name}" for part in body if hasattr(part, "name")}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


@pytest.mark.parametrize("page", ["glossary.md", "architecture.md"])
def test_everything_that_a_page_names_exists(page: str) -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    missing = [
        f"{file}: {name}"
        for file, name in sorted(named(page))
        if file not in files or (name and name not in names_in(files[file]))
    ]
    assert not missing


@pytest.mark.parametrize("title", ["A passage", "An example", "A metric"])
def test_a_journey_goes_from_entry_to_exit(title: str) -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    journey = page.split(f"### {title} ")[1].split("\n#")[0]
    assert len(JOURNEY.findall(journey)) >= 5
