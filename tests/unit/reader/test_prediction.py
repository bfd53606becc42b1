import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_dr.config import ConfigError
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.reader.config import ReaderPredictConfig
from mlflow_dr.reader.model import save_reader
from mlflow_dr.reader.prediction import ReaderPredictor, predict_answers, question_measures
from mlflow_dr.reader.preprocessing import reader_data
from mlflow_dr.reader.sequences import SequenceBuilder

Write = Callable[..., Path]


class Oracle(ReaderPredictor):
    """Finds the token `cat` and what follows it, and prefers later passages."""

    def _logits(self, sequences: Any) -> Any:
        longest = max(map(len, sequences))
        starts = np.full((len(sequences), longest), -1.0)
        for row, ids in enumerate(sequences):
            starts[row, : len(ids)] = ids == self._tokenizer.convert_tokens_to_ids("cat")
        return starts, np.roll(starts, 1, axis=1), np.arange(len(sequences), dtype=float)


def test_answers_are_cut_from_the_text(
    write_results: Write, builder: SequenceBuilder, tokenizer: Any
) -> None:
    data = reader_data(write_results(), builder, training=False)
    predictor = Oracle(None, tokenizer, [2, 4, 50])  # type: ignore[arg-type]
    first, second = predictor.predict(data)
    assert first.answers[2] is not None
    assert first.answers[2][:2] == ("cat sat", "cat sat")
    assert first.answers[4] is not None
    assert (first.answers[4].text, first.answers[4].decoded) == ("cat-", ["cat", "[UNK]"][0])
    assert first.answers[50] is not None
    assert first.answers[50].place == 4
    assert second.answers[50] is not None
    assert question_measures([first])["0"]["em@2"] == 0.0


def test_passages_without_room_and_questions_without_passages_have_no_answer(
    write_results: Write, builder: SequenceBuilder, tokenizer: Any
) -> None:
    path = write_results()
    question = json.loads(path.read_text())[0]
    path = write_results([question, question | {"ctxs": []}])
    data = reader_data(path, builder, training=False)
    found = list(Oracle(None, tokenizer, [5], length=9).predict(data))  # type: ignore[arg-type]
    assert [answers.answers for answers in found] == [{5: None}, {5: None}]
    nothing = {"em@5": 0.0, "f1@5": 0.0, "em_decoded@5": 0.0}
    assert question_measures(found) == {"0": nothing, "1": nothing}


def test_predictions_are_written_as_dpr_does(
    write_results: Write, make_reader: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    save_reader(tmp_path / "reader", make_reader(), tokenizer)
    config = ReaderPredictConfig(
        reader=str(tmp_path / "reader"),
        results=write_results(),
        output=tmp_path / "answers.json",
        eval_top_docs=(1, 5),
        sequence_length=64,
        device="cpu",
        dtype="fp32",
    )
    measures = predict_answers(config)
    names = [f"{name}@{n}" for n in (1, 5) for name in ("em", "f1", "em_decoded")]
    assert list(measures) == names
    first = json.loads((tmp_path / "answers.json").read_text())[0]
    assert first["question"] == "who sat on the mat"
    assert first["gold_answers"] == ["the cat", "cat"]
    assert [prediction["top_k"] for prediction in first["predictions"]] == [1, 5]
    prediction = first["predictions"][0]["prediction"]
    assert prediction["text"] in prediction["passage"] == "the dog ran"
    assert prediction["passage_idx"] == 0
    with pytest.raises(UsageError, match="exists already"):
        predict_answers(config)
    with pytest.raises(UsageError, match="only 3 passages are read"):
        predict_answers(config.replaced(passages_per_question=3, force=True))
    with pytest.raises(UsageError, match="reads at most 128 tokens"):
        predict_answers(config.replaced(sequence_length=129, force=True))


def test_a_reader_with_broken_weights_is_refused(
    write_results: Write, builder: SequenceBuilder, make_reader: Callable[[], Any], tokenizer: Any
) -> None:
    reader = make_reader()
    reader.qa_classifier.bias.data.fill_(float("nan"))
    data = reader_data(write_results(), builder, training=False)
    with pytest.raises(CheckpointError, match="gives NaN"):
        list(ReaderPredictor(reader, tokenizer, [1]).predict(data))


@pytest.mark.parametrize("words", [("1", "5"), ("1,5",), "1 5", (1, 5), (1, 5, 1)])
def test_numbers_of_passages_are_several_words_or_between_commas(words: Any) -> None:
    config = ReaderPredictConfig(reader="r", results=Path("r.json"), eval_top_docs=words)
    assert config.top_docs == (1, 5)


@pytest.mark.parametrize("words", ["0", "1;5", "-1", "1,x", "9" * 5000])
def test_what_is_no_number_of_passages_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"expected numbers of passages, such as 1 5 10"):
        ReaderPredictConfig(reader="r", results=Path("r.json"), eval_top_docs=(words,))
