"""A package from outside adds a subset strategy and a search back end."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.dense import DenseRetriever
from mlflow_dr.retrieval.search import SEARCH_BACKENDS, search_torch
from mlflow_dr.subsets.spec import SubsetTerm, parse_subset
from mlflow_dr.subsets.strategies import SUBSET_STRATEGIES, SubsetSources, subset_strategy
from mlflow_dr.subsets.subset import make_subset
from mlflow_dr.validation.evaluate_config import EvaluateConfig

QUERIES = [Query("q1", "the ship"), Query("q2", "the tide")]
STRATEGY = '''
import numpy as np
from mlflow_dr.subsets.strategies import subset_strategy

@subset_strategy("titled:WORD@K")
def titled(term, sources):
    """The first K passages, by id, whose title contains a word."""
    passages = (passage for batch in sources.corpus.batches() for passage in batch)
    ids = sorted(p.id for p in passages if term.arguments[0] in p.title)
    return [sources.corpus.rows_of(ids[: term.count])]
'''
BACKEND = '''
import torch

def sort_all(queries, chunk, k):
    """Sort all scores of a chunk."""
    scores, order = (queries @ chunk.T).sort(dim=1, descending=True)
    return scores[:, :k], order[:, :k]
'''


@pytest.fixture
def installed(install_package: Callable[..., Path]) -> None:
    """A package from outside with a strategy and a search back end."""
    install_package(
        {"outside_strategy.py": STRATEGY, "outside_backend.py": BACKEND},
        "[mlflow_dr.subset_strategies]\ntitled = outside_strategy:titled\n"
        "[mlflow_dr.search_backends]\nsorting = outside_backend:sort_all\n",
        SUBSET_STRATEGIES,
        SEARCH_BACKENDS,
    )


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny()


@pytest.fixture
def sources() -> SubsetSources:
    titles = ["ship" if number % 2 else "sea" for number in range(8)]
    ids, texts = [f"p{number}" for number in range(8)], ["text"] * 8
    corpus = Corpus(pa.table({"id": ids, "title": titles, "text": texts}))
    return SubsetSources(corpus, Topics([Query("q", "text")], {"q": {"p0": 1}}))


def ids(text: str, sources: SubsetSources) -> list[str]:
    subset = make_subset(parse_subset(text), sources)
    found: list[str] = subset.table()["passage_id"].to_pylist()
    return found


@pytest.mark.usefixtures("installed")
def test_a_strategy_by_entry_point(sources: SubsetSources) -> None:
    assert "outside_strategy" not in sys.modules
    assert ids("titled:ship@2", sources) == ["p0", "p1", "p3"]
    assert ids("titled:ship@1+titled:sea@2", sources) == ["p0", "p1", "p2"]
    assert parse_subset("titled:ship@2").slug == "titled_ship_at_2"
    with pytest.raises(UsageError, match="subset 'titled@2': expected titled:WORD@K"):
        parse_subset("titled@2")


def test_a_strategy_by_decorator(sources: SubsetSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SUBSET_STRATEGIES, "_parts", dict(SUBSET_STRATEGIES._parts))

    @subset_strategy("first:N")
    def first(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
        return [sources.corpus.rows_of([f"p{number}" for number in range(term.count)])]

    assert ids("first:3+random:1", sources)[:3] == ["p0", "p1", "p2"]
    assert SUBSET_STRATEGIES.get("first") is first
    with pytest.raises(UsageError, match="already registered"):
        subset_strategy("first@K")(first.choose)


@pytest.mark.parametrize("form", ["", "first:", "first:K", "first@N", "a b@K", "first:N@K@K"])
def test_a_strategy_with_a_malformed_form_is_refused(form: str) -> None:
    with pytest.raises(UsageError, match="expected NAME, NAME:N, NAME@K or NAME:ARGUMENT@K"):
        subset_strategy(form)(lambda term, sources: [])


@pytest.mark.usefixtures("installed")
def test_a_broken_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "outside_strategy.py").write_text("import nowhere")
    with pytest.raises(UsageError, match="'titled' cannot be imported from outside_strategy"):
        parse_subset("titled:ship@2")
    with pytest.raises(UsageError, match=r"expected one of bm25@K, .*random:N, .*titled"):
        parse_subset("rondom")


@pytest.mark.usefixtures("installed")
def test_a_search_back_end_by_entry_point(encoder: Encoder, sources: SubsetSources) -> None:
    results = [
        next(DenseRetriever(encoder, "cpu", "fp32", backend).search(sources.corpus, QUERIES, 5))
        for backend in ("sorting", "auto")
    ]
    np.testing.assert_array_equal(results[0].rows, results[1].rows)
    np.testing.assert_allclose(results[0].scores, results[1].scores, rtol=1e-5)


def test_a_search_back_end_by_decorator(
    encoder: Encoder, sources: SubsetSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SEARCH_BACKENDS, "_parts", dict(SEARCH_BACKENDS._parts))
    called = []

    @SEARCH_BACKENDS.register("counting")
    def counting(
        queries: torch.Tensor, chunk: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        called.append(len(chunk))
        return search_torch(queries, chunk, k)

    next(DenseRetriever(encoder, "cpu", "fp32", "counting").search(sources.corpus, QUERIES, 5))
    assert called == [8]


@pytest.mark.usefixtures("installed")
def test_a_configuration_names_the_search_back_end() -> None:
    config = EvaluateConfig(encoder="somewhere", dataset="demo", search_backend="sorting")
    assert config.search_backend == "sorting"
    with pytest.raises(UsageError, match="search_backend: unknown search back end 'nowhere'"):
        EvaluateConfig(encoder="somewhere", dataset="demo", search_backend="nowhere")
