"""Which cells a configuration asks for."""

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.loaders.config import LoadersConfig, parse_workers


def labels(**values: object) -> list[str]:
    return [cell.label for cell in LoadersConfig(**values).cells]


def test_the_usual_study_has_fourteen_cells() -> None:
    assert labels() == [
        *("memory", "memory, 2 workers", "lookup", "lookup, 2 workers"),
        *("ir_datasets", "ir_datasets, 2 workers", "arrow", "arrow, 2 workers"),
        *("tokens", "tokens, 2 workers", "tokens, 2 threads", "memory, 2 workers, forkserver"),
        *("lookup, RAM disk", "lookup, 2 ranks"),
    ]


def test_the_usual_study_trains_in_some_cells_and_another_one_in_all() -> None:
    cells = LoadersConfig(model="tiny").cells
    trained = [cell.label for cell in cells if cell.model == "tiny"]
    assert trained == ["lookup", "lookup, 2 workers", "tokens", "tokens, 2 workers"]
    assert {cell.model for cell in LoadersConfig(model="tiny", cache="cold").cells} == {"tiny"}


def test_every_combination_is_a_cell() -> None:
    assert labels(store=("lookup", "tokens"), workers=("0", "threads:2"), ranks=(1, 2)) == [
        *("lookup", "lookup, 2 ranks", "lookup, 2 threads", "lookup, 2 threads, 2 ranks"),
        *("tokens", "tokens, 2 ranks", "tokens, 2 threads", "tokens, 2 threads, 2 ranks"),
    ]


def test_what_makes_no_difference_without_workers_makes_no_cell() -> None:
    values = {"start_method": ("fork", "spawn"), "prefetch": (2, 8)}
    assert labels(store="lookup", workers="0", **values) == ["lookup"]
    assert labels(store="lookup", workers="2", **values) == [
        "lookup, 2 workers",
        "lookup, 2 workers, prefetch 8",
        "lookup, 2 workers, spawn",
        "lookup, 2 workers, spawn, prefetch 8",
    ]


def test_one_option_keeps_the_usual_stores() -> None:
    assert labels(cache="cold") == [
        *("memory, cold", "lookup, cold", "ir_datasets, cold", "arrow, cold", "tokens, cold")
    ]


@pytest.mark.parametrize("text", ["", "two", "-1", "threads:", "threads:0", "threads", "2.5"])
def test_workers_that_are_no_number_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="workers"):
        parse_workers(text)
    with pytest.raises(UsageError, match="workers"):
        LoadersConfig(workers=text)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"store": "lookpu"}, "did you mean 'lookup'"),
        ({"store": "tokens", "payload": "text"}, "has no texts"),
        ({"ramdisk": "yes", "cache": "cold"}, "never cold"),
        ({"model": "tiny", "payload": "lookup"}, "payload ids"),
        ({"model": "tiny", "tokenizer": "other"}, "has its own"),
        ({"repeats": 0}, "at least 1"),
        ({"seconds": 0.0}, "above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LoadersConfig(**values)
