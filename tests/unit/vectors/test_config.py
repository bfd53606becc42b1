"""The configurations of `encode` and `search`."""

from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig, parse_shard, parse_shards


def test_shards_are_numbered_from_zero() -> None:
    assert parse_shard("0/4") == (0, 4)
    assert parse_shard("3/4") == (3, 4)


@pytest.mark.parametrize("text", ["4/4", "8/4", "0/0", "1", "a/b", "-1/4", "1/4/2", "", "٣/٤"])
def test_shards_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError, match=r"numbered from 0; expected 0/4 to 3/4"):
        parse_shard(text.replace("0/0", "0/0/4"))
    with pytest.raises(UsageError, match="shard"):
        EncodeConfig(encoder="e", dataset="d", output=Path("o"), shard=text)


def test_all_shards() -> None:
    assert parse_shards("all/3") == (range(3), 3)
    assert parse_shards("2/3") == ([2], 3)
    for text in ("all/0", "all", "all/x", "every/3", "all/1/2"):
        with pytest.raises(UsageError, match="shard"):
            parse_shards(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": Path("o")}, "encoder is missing"),
        ({"encoder": "e"}, "output is missing"),
        ({"encoder": "e", "output": Path("o"), "log": True}, "log needs a published checkpoint"),
    ],
)
def test_what_encode_needs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncodeConfig(dataset="d", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ()}, "sources"),
        ({"sources": (Path("a"),), "shard": "0/2"}, "shard needs --output"),
        (
            {"sources": ("a",), "shard": "0/2", "output": "o", "file_format": "msmarco"},
            "msmarco cannot be merged",
        ),
    ],
)
def test_what_search_needs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchConfig(**values)
