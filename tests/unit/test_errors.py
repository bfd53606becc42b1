"""Messages stay lines that can be read, whatever they quote."""

import pytest

from mlflow_dr.errors import DataError, MlflowDrError, UsageError, quoted
from mlflow_dr.terminal import shortened


@pytest.mark.parametrize("kind", [MlflowDrError, DataError, UsageError])
def test_a_long_message_keeps_its_start_and_its_end(kind: type[MlflowDrError]) -> None:
    message = str(kind(f"file:7: id {'x' * 200_000} is wrong; remove it"))
    assert len(message) < 500
    assert message.startswith("file:7: id xxx")
    assert message.endswith("xxx is wrong; remove it")


def test_a_short_message_is_not_changed() -> None:
    assert str(DataError("file:7: what")) == "file:7: what"
    assert shortened("x" * 480) == "x" * 480


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 200_000, "'xxx"),
        (["y"] * 200_000, "['y', 'y'"),
        ({"key": "z" * 200_000}, "{'key': 'zzz"),
        (10**5000, "an integer of thousands of digits"),
        ([10**5000], "an integer of thousands of digits"),
    ],
    ids=["text", "list", "mapping", "number", "list of numbers"],
)
def test_a_value_is_quoted_by_its_start(value: object, start: str) -> None:
    assert quoted(value).startswith(start)
    assert len(quoted(value)) <= 100


def test_a_short_value_is_quoted_whole() -> None:
    assert quoted("it's") == '"it\'s"'
    assert quoted(None) == "None"
