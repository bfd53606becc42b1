"""Splits by name."""

import pytest

from mlflow_dr.collection.catalogue import validation_split


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (["dev", "test", "train"], "dev"),
        (["test", "train", "validation"], "validation"),
        (["test", "train"], "test"),
        (["2019", "2020"], "2019"),
        (["train"], "train"),
    ],
)
def test_a_development_split_is_preferred(splits: list[str], chosen: str) -> None:
    assert validation_split(splits) == chosen
