"""Files of texts without a collection."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.collection.records import Passage
from mlflow_dr.collection.text_files import read_text_files
from mlflow_dr.errors import DataError


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_keys_of_tevatrons_versions_are_read(tmp_path: Path) -> None:
    first = written(
        tmp_path / "corpus.jsonl",
        {"docid": "1", "title": "Sea", "text": "salt"},
        {"docid": 2, "document_text": "waves", "title": None},
    )
    second = written(tmp_path / "queries.jsonl", {"query_id": "q", "query": "why salt"})
    corpus = read_text_files([first, second])
    assert corpus.passages(range(3)) == [
        Passage("1", "Sea", "salt"),
        Passage("2", "", "waves"),
        Passage("q", "", "why salt"),
    ]


def test_token_ids_are_read(tmp_path: Path) -> None:
    corpus = read_text_files([written(tmp_path / "t.json", {"text_id": "1", "text": [5, 6]})])
    assert corpus.tokenised
    assert corpus[0].tokens == [5, 6]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "no id"}, r"t.jsonl:2: expected an id \(docid, "),
        ({"docid": "b"}, "t.jsonl:2: expected an id .* and a text"),
        ({"docid": "b", "text": 5}, "t.jsonl:2: expected"),
        ({"docid": "b", "text": "x", "title": 5}, "t.jsonl:2: title is 5"),
        ({"docid": "a", "text": "x"}, "t.jsonl:2: text id 'a' is used twice"),
        ({"docid": "b", "text": [1]}, "t.jsonl:2: some texts are token ids"),
        ({"docid": "", "text": "x"}, "t.jsonl:2"),
    ],
)
def test_a_malformed_record_is_named(record: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", {"docid": "a", "text": "fine"}, record)
    with pytest.raises(DataError, match=message):
        read_text_files([path])
