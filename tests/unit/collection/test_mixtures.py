"""The notation of mixtures."""

from pathlib import Path

import pytest

from mlflow_dr.collection.catalogue import parse_mixture
from mlflow_dr.errors import UsageError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("demo", [("demo", None)]),
        ("A@3+B@1", [("A", 3.0), ("B", 1.0)]),
        ("A + B@0.5", [("A", None), ("B", 0.5)]),
        (
            "irds:a/b@1e2+Tevatron/wikipedia-nq",
            [("irds:a/b", 100.0), ("Tevatron/wikipedia-nq", None)],
        ),
        ("A@3", [("A", 3.0)]),
        ("A@2+A", [("A", 2.0), ("A", None)]),
    ],
)
def test_parts_and_weights(text: str, parts: list[tuple[str, float | None]]) -> None:
    assert parse_mixture(text) == parts


def test_an_existing_path_is_never_split_into_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("A@3+B@1", "C@2", "D"):
        (tmp_path / name).write_text("")
    assert parse_mixture("A@3+B@1") == [("A@3+B@1", None)]
    assert parse_mixture(str(tmp_path / "A@3+B@1")) == [(str(tmp_path / "A@3+B@1"), None)]
    assert parse_mixture("C@2+D@2") == [("C@2", None), ("D", 2.0)]
    assert parse_mixture("C@2@5") == [("C@2", 5.0)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "many", ""])
def test_a_weight_is_a_positive_number(weight: str) -> None:
    with pytest.raises(UsageError, match=rf"'A@1\+B@{weight}': the weight of 'B' is '{weight}'"):
        parse_mixture(f"A@1+B@{weight}")


@pytest.mark.parametrize("text", ["", "A+", "+A", "A++B", "@3", "A+@3", " "])
def test_a_part_has_a_name(text: str) -> None:
    with pytest.raises(UsageError, match="a part without a name"):
        parse_mixture(text)
