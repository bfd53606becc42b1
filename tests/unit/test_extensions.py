"""Parts that other packages add are found by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.extensions import Registry


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package from outside, as pip would install it: a module and its metadata."""
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlflow_dr.colours]\nred = outside_colours:RED\nbroken = outside_nowhere:BLUE\n"
    )
    (tmp_path / "outside_colours.py").write_text("RED = '#f00'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("outside_colours", None)


def colours() -> Registry[str]:
    registry: Registry[str] = Registry("colour", "mlflow_dr.colours")
    registry.register("green")("#0f0")
    return registry


def test_a_registered_part_is_found() -> None:
    assert colours().get("green") == "#0f0"


def test_an_entry_point_is_found_and_listed_without_loading_it(installed: Path) -> None:
    registry = colours()
    assert registry.names() == ["broken", "green", "red"]
    assert "outside_colours" not in sys.modules
    assert registry.get("red") == "#f00"
    assert "red" in registry


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown colour 'gren'; did you mean 'green'\? \(known"):
        colours().get("gren")


def test_a_broken_package_is_named_and_the_others_work(installed: Path) -> None:
    registry = colours()
    with pytest.raises(UsageError, match="'broken' cannot be imported from outside_nowhere:BLUE"):
        registry.get("broken")
    assert registry.get("green") == "#0f0"


def test_a_name_is_registered_once() -> None:
    with pytest.raises(UsageError, match="already registered"):
        colours().register("green")("#0e0")
