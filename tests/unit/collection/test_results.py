"""Results of a retriever in DPR's layout, and gold passages."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlflow_dr.collection.results import (
    Result,
    ResultPassage,
    read_gold_passages,
    read_results,
    write_results,
)
from mlflow_dr.errors import DataError

RESULTS = [
    Result("who?", [ResultPassage("1", "Rye\u2028", "R", float(np.float32(80.1)), True)], ["rye"]),
    Result("why?", [], []),
]


def test_results_are_written_as_dpr_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, RESULTS, scores_as_text=True)
    passage = {"id": "1", "title": "R", "text": "Rye\u2028", "score": "80.1", "has_answer": True}
    plain = [
        {"question": "who?", "answers": ["rye"], "ctxs": [passage]},
        {"question": "why?", "answers": [], "ctxs": []},
    ]
    assert path.read_text() == json.dumps(plain, indent=4) + "\n"
    write_results(path, RESULTS)
    assert json.loads(path.read_text())[0]["ctxs"][0]["score"] == 80.1
    assert [result.question for _, result in read_results(path)] == ["who?", "why?"]
    write_results(path, [])
    assert json.loads(path.read_text()) == []


def test_gold_passages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gold.json"
    gold = {"question": "who?", "question_tokens": "who ?", "title": "R", "context": "Rye", "x": 1}
    path.write_text(json.dumps({"version": 1, "data": [gold]}))
    (passage,) = read_gold_passages(path)
    assert (passage.question_tokens, passage.context) == ("who ?", "Rye")
    path.write_text(json.dumps([gold]))
    with pytest.raises(DataError, match=r"gold\.json: no file of gold passages"):
        read_gold_passages(path)


def test_a_file_of_another_layout_is_no_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('[{"question": "who?"}]')
    with pytest.raises(DataError, match=r"results\.json\[0\]: no 'ctxs'"):
        list(read_results(path))
