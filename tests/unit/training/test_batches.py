import pytest

from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.errors import DataError
from mlflow_dr.training.batches import Collator, TrainingSet


class Listed:
    digest = "listed"

    def __init__(self, *examples: Example) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def passages(prefix: str, count: int) -> list[Passage]:
    return [Passage(f"{prefix}{index}", "", f"text {prefix}{index}") for index in range(count)]


def example(positives: int, negatives: int, query_id: str = "q") -> Example:
    return Example(Query(query_id, "which"), passages("p", positives), passages("n", negatives))


def test_the_positive_comes_first() -> None:
    group = TrainingSet(Listed(example(1, 5)), 4, seed=0)[0]
    assert [p.id[0] for p in group.passages] == ["p", "n", "n", "n"]


def test_positives_rotate_over_the_epochs() -> None:
    training_set = TrainingSet(Listed(example(3, 0)), 1, seed=0)
    seen = []
    for epoch in range(3):
        training_set.set_epoch(epoch)
        seen.append(training_set[0].passages[0].id)
    assert sorted(seen) == ["p0", "p1", "p2"]


def test_negatives_do_not_repeat_before_all_were_used() -> None:
    training_set = TrainingSet(Listed(example(1, 6)), 3, seed=0)
    seen: list[str] = []
    for epoch in range(3):
        training_set.set_epoch(epoch)
        seen += [p.id for p in training_set[0].passages[1:]]
    assert sorted(seen) == [f"n{index}" for index in range(6)]


def test_the_choice_depends_on_query_and_seed_alone() -> None:
    first = TrainingSet(Listed(example(1, 50, "a"), example(1, 50, "b")), 5, seed=1)
    other = TrainingSet(Listed(example(1, 50, "b")), 5, seed=1)
    assert first[1].passages == other[0].passages
    assert TrainingSet(Listed(example(1, 50, "b")), 5, seed=2)[0].passages != other[0].passages


def test_fewer_negatives_than_asked_are_repeated() -> None:
    group = TrainingSet(Listed(example(1, 2)), 6, seed=0)[0]
    assert len(group.passages) == 6


def test_no_negatives_where_some_are_asked_for_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match="--train_n_passages 1"):
        TrainingSet(Listed(example(1, 0)), 2, seed=0)[0]


def test_no_positives_is_an_error() -> None:
    with pytest.raises(DataError, match="no positives"):
        TrainingSet(Listed(example(0, 3)), 2, seed=0)[0]


def test_a_batch_is_padded_token_ids_in_order(tiny: Encoder) -> None:
    tokenizing = Tokenizing(tiny.tokenizer, tiny.settings)
    training_set = TrainingSet(Listed(example(1, 2, "a"), example(1, 2, "b")), 3, seed=0)
    groups = [training_set[0], training_set[1]]
    batch = Collator(tokenizing)(groups)
    ids = batch["passage"]["input_ids"]
    mask = batch["passage"]["attention_mask"]
    assert ids.shape == mask.shape
    assert len(ids) == 6
    flat = [p for group in groups for p in group.passages]
    for row, kept, expected in zip(ids, mask, tokenizing.passage_ids(flat), strict=True):
        assert row[kept.bool()].tolist() == expected
    assert len(batch["query"]["input_ids"]) == 2
