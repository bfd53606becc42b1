"""Which recipe stands behind which collection."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.flags import RECIPE_NAMES
from mlflow_dr.training.recipes import (
    DPR,
    GC_DPR,
    JUDGED,
    MSMARCO,
    NAMED,
    TINY,
    TRAINING_FILES,
    recipe_of,
)


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> str:
    return str(beir_folder({"p": "gulls"}, {"q": "what flies"}, train={"q": {"p": 1}}))


def test_the_recipes_of_the_catalogue() -> None:
    assert recipe_of("demo") is TINY
    assert recipe_of("msmarco") is MSMARCO
    assert recipe_of("demo", "mined.jsonl") is TRAINING_FILES


def test_collections_with_only_judgements(folder: str) -> None:
    for name in (
        folder,
        "irds:vaswani",
        "irds:beir/scifact",
        f"{folder}@3+irds:vaswani",
        "demo+demo",
    ):
        assert recipe_of(name) is JUDGED, name


def test_hard_negatives_are_not_dropped(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("{}")
    for name in (
        *("irds:msmarco-passage/train", "irds:msmarco-passage/train/triples-small"),
        *(str(file), f"{file}@3+{folder}", "Tevatron/wikipedia-nq+Tevatron/wikipedia-trivia"),
        f"msmarco+{folder}",
    ):
        assert recipe_of(name) is TRAINING_FILES, name
    assert recipe_of(folder, str(file)) is TRAINING_FILES


def test_a_mixture_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match="not a positive number"):
        recipe_of("demo@x+demo")


def test_a_named_recipe_replaces_that_of_the_dataset() -> None:
    assert tuple(NAMED) == RECIPE_NAMES
    assert recipe_of("demo", name="dpr") is DPR
    assert recipe_of("demo", name="msmarco") is MSMARCO
    assert recipe_of("nq-train.json", gc_dpr=True) is GC_DPR
    assert recipe_of("nq-train.json", name="dpr", gc_dpr=True) is DPR
