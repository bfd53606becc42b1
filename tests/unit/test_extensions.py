"""Parts that other packages add are found by name."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.extensions import Registry


@pytest.fixture
def installed(install_package: Callable[..., Path]) -> None:
    """A package from outside with a part that works and a part that does not."""
    install_package(
        {"outside_colours.py": "RED = '#f00'\n"},
        "[mlflow_dr.colours]\nred = outside_colours:RED\nbroken = outside_nowhere:BLUE\n",
    )


def colours() -> Registry[str]:
    registry: Registry[str] = Registry("colour", "mlflow_dr.colours")
    registry.register("green")("#0f0")
    return registry


def test_a_registered_part_is_found() -> None:
    assert colours().get("green") == "#0f0"


def test_an_entry_point_is_found_and_listed_without_loading_it(installed: None) -> None:
    registry = colours()
    assert registry.names() == ["broken", "green", "red"]
    assert "outside_colours" not in sys.modules
    assert registry.get("red") == "#f00"
    assert "red" in registry


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown colour 'gren'; did you mean 'green'\? \(known"):
        colours().get("gren")


def test_a_broken_package_is_named_and_the_others_work(installed: None) -> None:
    registry = colours()
    with pytest.raises(UsageError, match="'broken' cannot be imported from outside_nowhere:BLUE"):
        registry.get("broken")
    assert registry.get("green") == "#0f0"


def test_a_name_is_registered_once() -> None:
    with pytest.raises(UsageError, match="already registered"):
        colours().register("green")("#0e0")
