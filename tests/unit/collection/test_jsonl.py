"""One JSON array, item by item: whatever the size of what is read at a time."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlflow_dr.collection import jsonl
from mlflow_dr.collection.jsonl import read_records
from mlflow_dr.errors import DataError

ITEMS: list[dict[str, Any]] = [
    {"text": 'a "quoted" \\ \n é 字 \U0001f600 [1, 2], {', "n": -1.5e-3},
    {},
    {"nested": [{"a": [None, True, False, []]}, "]", "}"], "long": "x" * 50},
    {"n": 123456789012345678901234567890},
]


def items(path: Path) -> list[Any]:
    return [record for _, record in read_records(path, dict)]


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 22])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jsonl, "BYTES_AT_A_TIME", request.param)
    return int(request.param)


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_is_what_json_reads(
    tmp_path: Path, steps: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path / "a.json"
    text = json.dumps(ITEMS, indent=indent, ensure_ascii=ascii_only)
    path.write_text(f" \n{text}\n\n", encoding="utf-8")
    assert items(path) == ITEMS


def test_locations_are_indexes_and_packed_files_are_unpacked(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ITEMS).encode("utf-8-sig")))
    places = [(location, record) for location, record in read_records(path, dict)]
    assert places == [(f"{path}[{index}]", item) for index, item in enumerate(ITEMS)]


def test_an_empty_array_has_no_items(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "a.json"
    path.write_text("[ \n ]")
    assert items(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"b": 2}', r"a\.json:2: the file breaks off before the array ends.*byte 19"),
        ('[{"a": 1},\n{"b": "tex', r"a\.json:2: the file breaks off in the middle of an item"),
        ('[{"a": 1},\n{"b": [1, ', r"a\.json:2: the file breaks off in the middle of an item"),
        ('[{"a": 1},\n{"b": tr', r"a\.json:2: "),
        ('[{"a": 1},\n', r"a\.json:2: the file breaks off in the middle of an item"),
        ("[", r"a\.json:1: the file breaks off in the middle of an item"),
        ('[{"a": 1}\n{"b": 2}]', r"a\.json:2: expected ',' or '\]' after an item, got '{'"),
        ('[{"a": 1},\n{"b" 2, "c": "a longer text"}]', r"a\.json:2: not JSON \(Expecting ':'"),
        ('[{"a": 1},\n{"b": nul, "c": "a longer text"}]', r"a\.json:2: not JSON \(Expecting v"),
        ('[{"a": 1}, ]', r"a\.json:1: not JSON \(Expecting value\)"),
        ('[{"a": 1}]\n[{"b": 2}]', r"a\.json:2: text after the end of the array"),
        ('[{"a": "\\ud83d\\ude00"},\n{"b": "a \\uD83D b"}]', r"a\.json:2: .*pair \(\\ud83d\)"),
        ('[{"a": 1},\n{"\\udc00": [12345678901234567890]}]', r"a\.json:2: .*pair \(\\udc00\)"),
        ('[{"a": 1}, 5]', r"a\.json\[1\]: expected 'object', got 'int'"),
    ],
)
def test_malformed_arrays_are_errors_with_their_line(
    tmp_path: Path, steps: int, text: str, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        items(path)
    assert "\n" not in str(error.value)


def test_endless_nesting_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json:1: not JSON .*nested too deeply"):
        items(path)


def test_the_items_before_an_error_are_read(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": ')
    found = []
    with pytest.raises(DataError, match="breaks off"):
        for _, record in read_records(path, dict):
            found.append(record)
    assert found == [{"a": 1}, {"a": 2}]


def test_text_that_is_not_utf8(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1},\n{"b": "' + "é".encode("latin-1") + b'"}]')
    with pytest.raises(DataError, match=r"a\.json:2: not UTF-8 text .*at byte 18\)"):
        items(path)


def test_a_skipped_field_that_is_not_utf8(tmp_path: Path) -> None:
    class Named(msgspec.Struct):
        a: int

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "b": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON .*position 15"):
        list(read_records(path, Named))


def test_a_truncated_packed_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"n": n * 7919} for n in range(9999)]).encode()))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.json\.gz: the compressed file is damaged or trunc"):
        items(path)


def test_memory_holds_an_item_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    item = json.dumps({"text": "x" * 10_000})
    with path.open("w") as file:
        file.write("[" + ",".join([item] * 4000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, dict)) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size  # 40 MB
    assert peak < 8 * jsonl.BYTES_AT_A_TIME


def test_a_long_item_is_read_in_growing_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BYTES_AT_A_TIME", 16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 100_000}]))
    parsed = []
    parse = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, at: int = 0) -> Any:
        parsed.append(at)
        return parse(self, text, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    assert len(items(path)) == 1
    assert len(parsed) < 20


def test_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[{{"id": 1}},\n {{"id": {"9" * 5000}}}]')
    with pytest.raises(DataError, match=r"a\.json:2: the item has a number of thousands of digits"):
        items(path)


def test_an_endless_item_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.json"
    path.write_text('[{}, {"a": "' + "x" * (1 << 23) + '"}]')
    with pytest.raises(DataError, match=r"a\.json:1: an item is longer than 1 MiB"):
        items(path)
