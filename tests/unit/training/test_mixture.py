"""Several training sets as one: shares, passes and epochs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mlflow_dr.stores.token_table import token_table
from mlflow_dr.training.batches import Group, TrainingSet
from mlflow_dr.training.data import Mixture

Make = Callable[..., Any]


@pytest.fixture
def mixed(make_examples: Make) -> Make:
    """A function from sizes and weights to a mixture; every query has three positives."""

    def make(sizes: list[int], weights: list[float], seed: int = 0) -> Mixture:
        parts = []
        for number, size in enumerate(sizes):
            names = [f"{'abc'[number]}{index}" for index in range(size)]
            rows = [(name, [f"{name} {n}" for n in range(3)], []) for name in names]
            examples = make_examples(*rows)
            tokens = token_table([[1]] * 3 * size)
            first_key = 1000 * number
            parts.append(TrainingSet(examples, tokens, tokens, 1, seed=0, first_key=first_key))
        return Mixture(parts, weights, seed)

    return make


def epoch_of(mixture: Mixture, epoch: int) -> list[Group]:
    mixture.set_epoch(epoch)
    return [mixture[index] for index in range(len(mixture))]


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ([6, 4], [6.0, 4.0], [6, 4]),
        ([6, 4], [1.0, 1.0], [5, 5]),
        ([8, 2], [0.5, 1.5], [2, 8]),
        ([3, 3, 4], [1.0, 1.0, 1.0], [3, 4, 3]),
        ([10, 2], [1.0, 0.001], [12, 0]),
        ([2, 10], [0.001, 1.0], [0, 12]),
    ],
)
def test_an_epoch_has_each_sets_share(
    mixed: Make, sizes: list[int], weights: list[float], shares: list[int]
) -> None:
    mixture = mixed(sizes, weights)
    assert len(mixture) == sum(sizes)
    for epoch in range(3):
        found = Counter(group.query_id[0] for group in epoch_of(mixture, epoch))
        assert [found["abc"[number]] for number in range(len(sizes))] == shares


def test_nothing_is_repeated_before_a_pass_ends(mixed: Make) -> None:
    """A small set with a large weight is read twice an epoch; a large one continues next epoch."""
    mixture = mixed([9, 3], [1.0, 1.0])
    seen: dict[str, list[str]] = {"a": [], "b": []}
    for epoch in range(6):
        for group in epoch_of(mixture, epoch):
            seen[group.query_id[0]].append(group.query_id)
    for name, size in (("a", 9), ("b", 3)):
        assert len(seen[name]) == 36
        for start in range(0, 36, size):
            assert len(set(seen[name][start : start + size])) == size
    assert seen["b"][:3] != seen["b"][3:6] or seen["b"][3:6] != seen["b"][6:9]


def test_each_pass_uses_the_next_positive(mixed: Make) -> None:
    mixture = mixed([9, 3], [1.0, 1.0])
    keys: dict[str, list[int]] = {}
    for epoch in range(2):  # of b's three queries, four passes
        for group in epoch_of(mixture, epoch):
            keys.setdefault(group.query_id, []).append(int(group.keys[0]))
    for name in ("b0", "b1", "b2"):
        assert len(keys[name]) == 4
        assert len(set(keys[name][:3])) == 3
        assert keys[name][3] == keys[name][0]


def test_passages_of_different_sets_have_different_keys(mixed: Make) -> None:
    mixture = mixed([4, 4], [1.0, 1.0])
    keys = [
        (group.query_id[0], int(group.keys[0]))
        for epoch in range(3)
        for group in epoch_of(mixture, epoch)
    ]
    assert {name for name, key in keys if key < 1000} == {"a"}
    assert {name for name, key in keys if key >= 1000} == {"b"}


def test_the_order_depends_on_seed_and_epoch_alone(mixed: Make) -> None:
    def order(mixture: Mixture, epoch: int) -> list[tuple[str, int]]:
        return [(group.query_id, int(group.keys[0])) for group in epoch_of(mixture, epoch)]

    first = mixed([7, 5], [2.0, 1.0])
    forward = [order(first, epoch) for epoch in range(3)]
    backward = [order(mixed([7, 5], [2.0, 1.0]), epoch) for epoch in (2, 1, 0)]
    assert forward == backward[::-1]
    assert [order(first, epoch) for epoch in (2, 0, 1)] == [forward[2], forward[0], forward[1]]
    assert order(mixed([7, 5], [2.0, 1.0], seed=1), 0) != forward[0]


def test_persistent_workers_see_the_next_epoch(mixed: Make) -> None:
    def names(groups: list[Group]) -> list[tuple[str, int]]:
        return [(group.query_id, int(group.keys[0])) for group in groups]

    found = []
    for options in ({}, {"num_workers": 2, "persistent_workers": True}):
        mixture = mixed([7, 5], [2.0, 1.0])
        loader = DataLoader(mixture, batch_size=3, collate_fn=names, **options)
        epochs = []
        for epoch in range(3):
            mixture.set_epoch(epoch)
            epochs.append(list(loader))
        found.append(epochs)
    assert found[0] == found[1]
