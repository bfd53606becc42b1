"""The code of docs/extending.md works as a package from outside."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes import FILE, ROOT, blocks

from mlflow_dr.collection.catalogue import all_formats, dataset_formats, open_collection
from mlflow_dr.errors import DataError
from mlflow_dr.retrieval.search import SEARCH_BACKENDS, TopK, find_backend
from mlflow_dr.stores.store import STORES, open_store, store_directory
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.subsets.strategies import SUBSET_STRATEGIES, SubsetSources
from mlflow_dr.training.flags import losses
from mlflow_dr.training.loss import Objective

PAGE = ROOT / "docs" / "extending.md"
REGISTRIES = [dataset_formats, SUBSET_STRATEGIES, losses, SEARCH_BACKENDS, STORES]
LINES = "what do gulls eat\tfish\nwhere is the lighthouse\ton a rock\nwho sails\tthe captain\n"


@pytest.fixture(autouse=True)
def other_package(install_package: Callable[..., Path]) -> None:
    """The package of the page, as pip would install it."""
    files = {block.note.removeprefix(FILE): block.text for block in blocks(PAGE, "python")}
    (project,) = (tomllib.loads(block.text)["project"] for block in blocks(PAGE, "toml"))
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    install_package({"outside/__init__.py": "", **files}, "\n".join(points), *REGISTRIES)


def test_every_registry_has_a_part_on_the_page() -> None:
    (block,) = blocks(PAGE, "toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    assert set(groups) == {registry.group for registry in REGISTRIES}
    for registry in REGISTRIES:
        assert set(groups[registry.group]) <= set(registry.names())


def test_a_dataset_format(tmp_path: Path) -> None:
    file = tmp_path / "questions.faq"
    file.write_text(LINES)
    for name in (f"faq:{file}", str(file)):
        collection = open_collection(name)
        assert len(collection.corpus()) == 3
        assert collection.topics("test").qrels["question-1"] == {"answer-1": 1}
        assert len(collection.examples()) == 3
        assert open_collection(collection.name).corpus().digest == collection.corpus().digest
    assert "faq:FILE" in {form.pattern for form in all_formats()}
    file.write_text("no tab here\n")
    with pytest.raises(DataError, match=r"questions.faq:1: no tab"):
        open_collection(str(file)).corpus()


def test_a_subset_strategy(tmp_path: Path) -> None:
    file = tmp_path / "questions.faq"
    file.write_text(LINES)
    collection = open_collection(str(file))
    sources = SubsetSources(collection.corpus(), collection.topics("test"))
    (rows,) = SUBSET_STRATEGIES.get("shortest").choose(parse_subset("shortest:2").terms[0], sources)
    assert [passage.text for passage in sources.corpus.passages(rows)] == ["fish", "on a rock"]


def test_a_loss() -> None:
    """Each positive scores 5, each other passage 0: margins are 5, the teacher's are 4."""
    queries = 5 * torch.eye(2, 3)
    passages = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
    teacher = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    assert Objective(loss="hinge")(queries, passages) == 0
    assert Objective(loss="hinge")(queries / 10, passages) == 3 * 0.5
    assert Objective(loss="margin_mse")(queries, passages, teacher=teacher) == 1


def test_a_search_backend() -> None:
    queries, chunk = torch.eye(2, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]])
    search = find_backend("sorting", torch.device("cpu"))
    top = TopK(2, 2, np.array([3, 2, 1, 0]))
    top.update(queries, chunk, torch.arange(4), search)
    assert top.scores.tolist() == [[1, 1], [1, 1]]
    assert top.rows.tolist() == [[2, 1], [2, 1]]


def test_a_document_store(tmp_path: Path) -> None:
    file = tmp_path / "questions.faq"
    file.write_text(LINES)
    corpus = open_collection(str(file)).corpus()
    with open_store("sqlite", store_directory("sqlite", corpus)) as store:
        assert store.get_many([2, 0, 2]) == corpus.passages([2, 0, 2])
        assert store.rows_of(["answer-2"]).tolist() == [1]
