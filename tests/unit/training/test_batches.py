"""Which passages an example is trained with in which epoch, and the batches made of them."""

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlflow_dr.collection.records import Example
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.training.batches import (
    Collator,
    Group,
    TrainingSet,
    check_negatives,
    training_set,
)
from mlflow_dr.training.data import Mixture

Make = Callable[..., Any]


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


@pytest.fixture
def make_group(make_examples: Make) -> Make:
    """A function from numbers of positives and negatives to the set of one query."""

    def make(
        positives: int,
        negatives: int,
        n_passages: int,
        query_id: str = "q",
        scores: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> TrainingSet:
        row = (query_id, named("p", positives), named("n", negatives), scores)
        examples = make_examples(row)
        tokens = token_table([[10 + number] for number in range(positives + negatives)])
        return TrainingSet(examples, token_table([[1]]), tokens, n_passages, seed, **options)

    return make


def rows_in(chosen: TrainingSet, epoch: int, index: int = 0) -> list[int]:
    chosen.set_epoch(epoch)
    return chosen[index].keys.tolist()


def test_the_positive_comes_first_and_tokens_belong_to_keys(make_group: Make) -> None:
    group = make_group(1, 5, 4)[0]
    assert group.query_id == "q"
    assert group.query.tolist() == [1]
    assert group.keys[0] == 0
    assert set(group.keys[1:]) < {1, 2, 3, 4, 5}
    assert [tokens.tolist() for tokens in group.passages] == [[10 + key] for key in group.keys]
    assert make_group(1, 5, 4, first_key=100)[0].keys.tolist() == (group.keys + 100).tolist()


def test_positives_rotate_over_the_epochs(make_group: Make) -> None:
    chosen = make_group(3, 0, 1)
    seen = [rows_in(chosen, epoch) for epoch in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [[0], [1], [2]]


@pytest.mark.parametrize(("available", "asked"), [(6, 2), (5, 2), (5, 4), (7, 1)])
def test_negatives_repeat_only_after_all_were_used(
    make_group: Make, available: int, asked: int
) -> None:
    chosen = make_group(1, available, 1 + asked)
    seen = [row for epoch in range(available) for row in rows_in(chosen, epoch)[1:]]
    for used in range(1, asked + 1):
        assert set(Counter(seen[: used * available]).values()) == {used}
        assert set(seen[: used * available]) == set(range(1, available + 1))


def test_too_few_negatives_are_repeated_evenly(make_group: Make) -> None:
    assert sorted(Counter(rows_in(make_group(1, 2, 6), 0)[1:]).values()) == [2, 3]
    assert rows_in(make_group(1, 1, 4), 3) == [0, 1, 1, 1]


def test_the_choice_depends_on_query_epoch_and_seed_alone(
    make_group: Make, make_examples: Make, tiny: Encoder, set_of: Make
) -> None:
    """The position of the query, other queries and earlier reads do not matter."""

    def row(name: str) -> tuple[str, list[str], list[str]]:
        return (name, named(f"{name} is ", 5), named(f"{name} is not ", 40))

    def ids(chosen: TrainingSet, examples: Any, index: int) -> list[str]:
        return [examples.passages[key].id for key in chosen[index].keys]

    alone = make_examples(row("b"), digest="alone")
    among = make_examples(row("a"), row("b"), digest="among")
    first, second = set_of(tiny, alone, 5, seed=1), set_of(tiny, among, 5, seed=1)
    for epoch in (3, 0, 1):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        second[0]
        assert ids(first, alone, 0) == ids(second, among, 1)
    other = set_of(tiny, alone, 5, seed=2)
    other.set_epoch(1)
    assert ids(other, alone, 0) != ids(first, alone, 0)
    assert len({tuple(rows_in(first, epoch)) for epoch in range(8)}) == 8
    of_a, of_b = (np.array(rows_in(second, 0, index)) for index in range(2))
    assert (of_a + 45).tolist() != of_b.tolist()


def test_a_process_reads_its_share_with_the_same_passages(
    colours: Any, tiny: Encoder, set_of: Make
) -> None:
    """As in the ranks of a distributed training, each in a process of its own."""
    whole = set_of(tiny, colours, 3)
    for rank in range(2):
        own = pickle.loads(pickle.dumps(set_of(tiny, colours, 3)))
        for epoch in range(3):
            own.set_epoch(epoch)
            whole.set_epoch(epoch)
            for index in range(rank, len(whole), 2):
                assert own[index].keys.tolist() == whole[index].keys.tolist()
                assert own[index].query.tolist() == whole[index].query.tolist()


def keys_of(groups: list[Group]) -> list[list[int]]:
    return [group.keys.tolist() for group in groups]


@pytest.mark.parametrize(
    "workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str
)
def test_workers_choose_as_this_process_does(
    colours: Any, tiny: Encoder, set_of: Make, workers: dict[str, Any]
) -> None:
    """Also those that outlive an epoch."""
    found = []
    for options in ({}, workers):
        chosen = set_of(tiny, colours, 3)
        loader = DataLoader(chosen, batch_size=3, collate_fn=keys_of, **options)
        epochs = []
        for epoch in range(3):
            chosen.set_epoch(epoch)
            epochs.append(list(loader))
        found.append(epochs)
    assert found[0] == found[1]
    assert found[0][0] != found[0][1] != found[0][2]


def test_scores_follow_their_passages(make_group: Make) -> None:
    scores = [10.0, 11.0, 20.0, 21.0, 22.0]  # two positives, then three negatives
    chosen = make_group(2, 3, 3, scores=scores, with_scores=True)
    for epoch in range(6):
        chosen.set_epoch(epoch)
        group = chosen[0]
        assert group.scores.tolist() == [scores[key] for key in group.keys]
        assert group.scores.dtype == np.float32
    assert make_group(2, 3, 3, scores=scores)[0].scores is None


@pytest.mark.parametrize("scores", [None, [1.0, float("nan"), 2.0]])
def test_missing_scores_are_an_error_that_names_the_query(make_group: Make, scores: Any) -> None:
    with pytest.raises(
        DataError, match=r"query 'q7' lacks a teacher's scores of some passages; the loss"
    ):
        make_group(1, 2, 3, "q7", scores, with_scores=True)[0]


def test_a_query_without_negatives_gets_passages_that_are_not_its_positives(
    tiny: Encoder, set_of: Make, make_examples: Make
) -> None:
    texts = [f"passage {number}" for number in range(9)]
    examples = make_examples(("q7", texts[:3], []), ("q8", texts[3:4], texts[4:]))
    chosen = set_of(tiny, examples, 4)
    seen = set()
    for epoch in range(6):
        chosen.set_epoch(epoch)
        negatives = chosen[0].keys[1:].tolist()
        assert not {0, 1, 2} & set(negatives)
        seen.add(tuple(negatives))
    assert len(seen) > 1
    again = set_of(tiny, examples, 4)
    again.set_epoch(5)
    assert again[0].keys.tolist() == chosen[0].keys.tolist()
    assert len(set_of(tiny, examples, 1)[0].passages) == 1


def test_missing_negatives_are_reported_before_training(
    make_examples: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bare = make_examples(("q7", ["one"], []))
    check_negatives(bare, 1, "mine")
    with pytest.raises(
        UsageError, match="mine: no query has hard negatives; find some by `mlflow-dr mine`"
    ):
        check_negatives(bare, 2, "mine")
    caplog.set_level("INFO", "mlflow_dr")
    check_negatives(
        make_examples(("q7", ["one"], []), ("q8", ["two"], ["a"]), ("q9", ["three"], ["a", "b"])),
        *(3, "mine"),
    )
    assert [record.getMessage() for record in caplog.records] == [
        "mine: 1 of 3 queries have no hard negatives and get random passages instead",
        "mine: 1 queries have fewer than 2 hard negatives and repeat them",
    ]


def test_no_positives_is_an_error(make_group: Make) -> None:
    with pytest.raises(DataError, match="query 'q7' has no positives"):
        make_group(0, 3, 2, "q7")[0]


def test_the_token_table_has_the_tokenizers_ids(colours: Any, tiny: Encoder, set_of: Make) -> None:
    text_tokenizer = TextTokenizer.of(tiny)
    for store in (None, "corpus", "lookup"):
        chosen = set_of(tiny, colours, 4, store=store)
        for index in range(len(colours)):
            group = chosen[index]
            example: Example = colours[index]
            (query,) = text_tokenizer.query_ids([example.query])
            assert group.query.tolist() == query
            passages = text_tokenizer.passage_ids([colours.passages[key] for key in group.keys])
            assert [tokens.tolist() for tokens in group.passages] == passages


def test_late_tokens_equal_those_of_the_table(colours: Any, tiny: Encoder, own_cache: Any) -> None:
    """And no table of the passages is made."""
    settings = replace(tiny.settings, passage_prompt="ship: ", passage_max_length=6)
    text_tokenizer = TextTokenizer(tiny.tokenizer, settings)
    options: dict[str, Any] = {"n_passages": 1, "seed": 0}
    late = training_set(colours, text_tokenizer, text_tokenizer, store="lookup", **options)
    assert len([path for path in (own_cache / "tokens").iterdir() if path.is_dir()]) == 1
    table = training_set(colours, text_tokenizer, text_tokenizer, **options)
    assert len([path for path in (own_cache / "tokens").iterdir() if path.is_dir()]) == 2
    rows = np.arange(len(colours.passages))
    for ids, others in zip(
        late._passages.get_many(rows), table._passages.get_many(rows), strict=True
    ):
        assert ids.tolist() == others.tolist()
        assert len(ids) == 6


def test_a_batch_has_the_groups_of_its_examples_and_is_read_at_once(
    colours: Any, tiny: Encoder, set_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is called once for all passages of a batch."""
    calls: list[int] = []
    passage_ids = TextTokenizer.passage_ids

    def counted(self: TextTokenizer, passages: Any) -> list[list[int]]:
        calls.append(len(passages))
        return passage_ids(self, passages)

    late, ahead = set_of(tiny, colours, 3, store="lookup"), set_of(tiny, colours, 3)
    for chosen in (late, ahead, Mixture([ahead, late], [2.0, 1.0], seed=0)):
        chosen.set_epoch(2)
        indices = [3, 0, 3, len(chosen) - 1]
        alone = [chosen[index] for index in indices]
        for group, other in zip(chosen.__getitems__(indices), alone, strict=True):
            assert (group.query_id, group.scores) == (other.query_id, other.scores)
            np.testing.assert_array_equal(group.query, other.query)
            np.testing.assert_array_equal(group.keys, other.keys)
            for ids, expected in zip(group.passages, other.passages, strict=True):
                np.testing.assert_array_equal(ids, expected)
    monkeypatch.setattr(TextTokenizer, "passage_ids", counted)
    late.__getitems__([0, 1, 2])
    assert calls == [9]


def test_a_batch_is_padded_token_ids_in_order() -> None:
    rows = [[5, 6, 7], [8], [9, 9], [10, 11, 12, 13]]
    groups = [
        Group("a", np.array([1, 2]), [np.array(row) for row in rows[:2]], np.array([3, 4]), None),
        Group("b", np.array([3]), [np.array(row) for row in rows[2:]], np.array([5, 3]), None),
    ]
    batch = Collator(query_pad_id=99, passage_pad_id=77)(groups)
    assert batch["query_ids"] == ["a", "b"]
    assert batch["keys"].tolist() == [3, 4, 5, 3]
    assert "teacher" not in batch
    assert batch["query"]["input_ids"].tolist() == [[1, 2], [3, 99]]
    passages = batch["passage"]
    assert passages["input_ids"].tolist() == [
        [5, 6, 7, 77],
        [8, 77, 77, 77],
        [9, 9, 77, 77],
        [10, 11, 12, 13],
    ]
    for row, mask, expected in zip(
        passages["input_ids"], passages["attention_mask"], rows, strict=True
    ):
        assert row[mask.bool()].tolist() == expected
    assert passages["input_ids"].dtype == passages["attention_mask"].dtype == torch.int64


def test_a_batch_has_the_teachers_scores_by_query() -> None:
    scores = [np.array([1, 2], np.float32), np.array([3, 4], np.float32)]
    groups = [
        Group(str(i), np.array([1]), [np.array([1])] * 2, np.array([0, 1]), values)
        for i, values in enumerate(scores)
    ]
    batch = Collator(0, 0)(groups)
    assert batch["teacher"].tolist() == [[1, 2], [3, 4]]
    assert batch["teacher"].dtype == torch.float32
