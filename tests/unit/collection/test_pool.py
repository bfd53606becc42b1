"""The questions of training examples, judged on the passages of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.errors import DataError, UsageError


def passage(name: str) -> dict[str, str]:
    return {"title": f"title of {name}", "text": f"all about {name}", "psg_id": name}


def written(folder: Path, records: list[Any]) -> str:
    (folder / "nq-dev.json").write_text(json.dumps(records))
    return f"pool:{folder / 'nq-dev.json'}"


def question(text: str, positives: list[str], negatives: list[str], **more: Any) -> Any:
    return {
        "question": text,
        "answers": [],
        "positive_ctxs": [passage(name) for name in positives],
        "negative_ctxs": [],
        "hard_negative_ctxs": [passage(name) for name in negatives],
        **more,
    }


def test_a_dpr_development_file(tmp_path: Path) -> None:
    pool = open_collection(
        written(tmp_path, [question("one?", ["a", "b"], ["c"]), question("two?", ["c"], ["d"])])
    )
    topics = pool.topics("dev")
    assert pool.splits == ("dev",)
    assert sorted(pool.corpus().ids.to_pylist()) == ["a", "b", "c", "d"]
    assert [query.text for query in topics.queries] == ["one?", "two?"]
    assert topics.qrels == {"0": {"a": 1, "b": 1}, "1": {"c": 1}}
    assert len(pool.examples()) == 2
    with pytest.raises(UsageError, match="has no split 'test'; it has: dev"):
        pool.topics("test")


def test_questions_with_one_id(tmp_path: Path) -> None:
    records = [
        question("one?", ["a"], ["c"], query_id="7"),
        question("one?", ["b"], ["c"], query_id="7"),
        question("two?", ["c"], ["d"], query_id="7"),
    ]
    topics = open_collection(written(tmp_path, records)).topics("dev")
    assert topics.qrels == {"7": {"a": 1, "b": 1}, "7#2": {"c": 1}}
    assert [query.text for query in topics.queries] == ["one?", "two?"]


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("pool:", f"pool:{tmp_path}/none.json"):
        with pytest.raises(UsageError, match="expected pool:FILE"):
            open_collection(name)
    with pytest.raises(DataError):
        open_collection(written(tmp_path, [])).topics("dev")


def test_the_name_is_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tmp_path, [question("one?", ["a"], ["c"])])
    monkeypatch.chdir(tmp_path)
    assert open_collection("pool:nq-dev.json").name == whole
