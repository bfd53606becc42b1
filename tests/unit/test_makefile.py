"""`make` looks at Python before it makes anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with our Makefile, and Pythons of several versions in it."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(MAKEFILE.parent / name, tmp_path)
    old = '#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.18; else echo 0; fi\n'
    for name, text in (
        ("python3.9", old),
        ("python3.11", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
        ("python3.12", '#!/bin/sh\necho "3.12.1 (another one)"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def planned(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    arguments = ("make", "--dry-run", "--directory", str(folder), *arguments)
    return subprocess.run(arguments, capture_output=True, text=True)


def environment(folder: Path, python: str) -> Path:
    """An environment of this Python, as `make` would have made it."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    link = folder / ".venv" / "bin" / "python"
    link.symlink_to(folder / python)
    return link


@pytest.mark.parametrize("goal", [[], ["ui"]])
def test_a_python_that_is_too_old_is_refused_with_the_way_out(
    folder: Path, goal: list[str]
) -> None:
    done = planned(folder, *goal, f"PYTHON={folder}/python3.9")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "python3.9 is Python 3.9.18, and Python 3.11 or newer is needed" in line
    assert f"make {(*goal, 'demo')[0]} PYTHON=python3." in line
    assert not (folder / ".venv").exists()


def test_the_environment_of_another_python_is_replaced(folder: Path) -> None:
    environment(folder, "python3.12")
    done = planned(folder, "demo", f"PYTHON={folder}/python3.11")
    assert f"{folder}/python3.11 -m venv .venv" in done.stdout
    assert "it is replaced" in done.stderr
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("arguments", [["PYTHON={}/python3.11"], []])
def test_a_suitable_environment_is_kept(folder: Path, arguments: list[str]) -> None:
    environment(folder, "python3.11")
    done = planned(folder, "ui", "PORT=5001", *(argument.format(folder) for argument in arguments))
    assert "-m venv" not in done.stdout
    assert "mlflow-dr ui --port 5001" in done.stdout
    assert (folder / ".venv").exists()


def test_an_environment_that_is_too_old_is_not_kept(folder: Path) -> None:
    environment(folder, "python3.9")
    done = planned(folder, "demo", f"PYTHON={folder}/python3.11")
    assert "-m venv .venv" in done.stdout
