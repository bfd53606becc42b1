import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest import LogCaptureFixture

from mlflow_dr.errors import DataError
from mlflow_dr.reader.batches import ReaderCollator, ReaderTrainingSet, by_question
from mlflow_dr.reader.data import ReaderData
from mlflow_dr.reader.preprocessing import reader_data
from mlflow_dr.reader.sequences import SequenceBuilder

HEAD = 9  # tokens before the passage: [CLS], five of the question, [SEP], the title, [SEP]


@pytest.fixture
def data(write_results: Callable[..., Path], builder: SequenceBuilder) -> ReaderData:
    return reader_data(write_results(), builder, training=True)


def training_set(data: ReaderData, length: int = 100, seed: int = 1) -> ReaderTrainingSet:
    return ReaderTrainingSet(data, length, n_passages=2, max_answers=2, seed=seed)


def chosen(groups: ReaderTrainingSet, visits: range) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tuple(ids) for ids in groups.group(0, visit).sequences) for visit in visits]


def test_positives_and_negatives_take_turns(data: ReaderData) -> None:
    groups = training_set(data)
    seen = chosen(groups, range(6))
    assert len({positive for positive, _ in seen[:3]}) == 3
    assert len({negative for _, negative in seen[:2]}) == 2
    assert seen == chosen(training_set(data), range(6))
    groups.set_epoch(2)
    assert tuple(tuple(ids) for ids in groups[0].sequences) == seen[2]


def test_spans_are_of_the_answers_before_the_cut(data: ReaderData) -> None:
    counts = [len(training_set(data).group(0, visit).spans) for visit in range(3)]
    assert sorted(counts) == [1, 2, 2]  # at most two, of four in p1, two in p2 and one in p3
    for visit in range(6):  # p2 has its answers at its end
        group = training_set(data, HEAD + 2).group(0, visit)
        assert max(map(len, group.sequences)) <= HEAD + 2
        assert (group.spans[:, 1] < HEAD + 2).all()
        assert len(group.spans)


def test_a_question_whose_answers_are_all_cut_off_is_left_out(
    data: ReaderData,
    write_results: Callable[..., Path],
    builder: SequenceBuilder,
    caplog: LogCaptureFixture,
) -> None:
    with pytest.raises(DataError, match="no question has an answer within 9 tokens"):
        training_set(data, HEAD)
    first = json.loads(write_results().read_text())[0]
    two = [first, first | {"ctxs": [first["ctxs"][2]]}]
    both = reader_data(write_results(two), builder, training=True)
    assert len(training_set(both, HEAD + 2)) == 1
    assert "left out 1 of 2 questions" in caplog.text


def test_a_batch_has_places_and_spans_of_each_question(data: ReaderData) -> None:
    groups = [training_set(data).group(0, visit) for visit in range(2)]
    batch = ReaderCollator(0)([groups[0], groups[1]._replace(sequences=groups[1].sequences[:1])])
    assert batch["places"].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["span_mask"].sum(1).tolist() == [len(group.spans) for group in groups]
    assert batch["spans"][batch["span_mask"]].tolist() == [
        pair for group in groups for pair in group.spans.tolist()
    ]
    table, positives = by_question(torch.tensor([1.0, 2.0, 3.0]), batch["places"])
    assert table.tolist() == [[1.0, 2.0], [3.0, -torch.inf]]
    assert positives.tolist() == [0, 2]
