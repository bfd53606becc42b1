"""`--validation_fraction`: queries that are held out of training, and validated on."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_dr.collection.catalogue import Examples
from mlflow_dr.collection.held_out import HELD_OUT, SomeExamples, hold_out
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.artifacts import held_out_topics, keep_held_out
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.data import TrainingData, open_data, validated_dataset
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.validation.resolve import EvalDatasets
from mlflow_dr.validation.validations import EvalConfig, Validation

Make = Callable[..., Any]


def opened(*argv: object, seed: int = 0) -> TrainingData:
    return open_data(parse_training(list(map(str, argv))).data, seed)


def ids(examples: Examples) -> list[str]:
    return [examples[row].query.id for row in range(len(examples))]


@pytest.fixture
def ten(make_examples: Make) -> Examples:
    """Ten queries with a positive each, and as many negatives as their number."""
    rows = [(f"q{n}", [f"p{n}"], [f"n{n} {m}" for m in range(n)]) for n in range(10)]
    return make_examples(*rows)


@pytest.fixture
def folder(beir_folder: Make) -> Path:
    """A collection with twenty training queries, and one to validate on."""
    passages = {f"p{n}": f"the passage of {n}" for n in range(21)}
    queries = {f"q{n}": f"the query of {n}" for n in range(21)}
    train = {f"q{n}": {f"p{n}": 1} for n in range(20)}
    return beir_folder(passages, queries, train=train, dev={"q20": {"p20": 1}})


def test_a_query_is_trained_on_or_held_out(ten: Examples) -> None:
    (left,), held_out = hold_out([ten], 0.3, seed=1)
    held = [query.id for query in held_out.queries]
    assert len(held) == 3
    assert sorted([*ids(left), *held]) == sorted(ids(ten))
    assert held_out.qrels == {name: {f"p{name[1:]}": 1} for name in held}
    assert left.negative_counts().tolist() == [int(name[1:]) for name in ids(left)]
    assert left.digest != ten.digest


def test_the_seed_chooses_and_the_order_does_not(make_examples: Make) -> None:
    def held(names: Sequence[str], seed: int) -> set[str]:
        _, topics = hold_out([make_examples(*((n, [n], []) for n in names))], 0.25, seed)
        return {query.id for query in topics.queries}

    names = [f"q{n}" for n in range(40)]
    assert held(names, 0) == held(names[::-1], 0) != held(names, 1)


def test_copies_of_a_query_are_on_one_side(make_examples: Make) -> None:
    """`make_examples` makes the text of its id; the same id and the same text are copies."""
    rows = [(name, [f"{name} {copy}"], []) for copy in range(3) for name in ("a", "A", "b", "c")]
    other = make_examples(*((name, [f"other {name}"], []) for name in "abcd"))
    for seed in range(8):
        (left, left_of_other), held_out = hold_out([make_examples(*rows), other], 0.3, seed)
        held = {query.text.casefold() for query in held_out.queries}
        assert len(held) == 1
        assert not held & {left[row].query.text.casefold() for row in range(len(left))}
        assert not held & {left_of_other[row].query.text for row in range(len(left_of_other))}
        assert len(left_of_other) == 3
        for query in held_out.queries:
            positives = {f"{query.id} {copy}": 1 for copy in range(3)}
            assert held_out.qrels[query.id] == positives


def test_something_must_be_left(make_examples: Make) -> None:
    with pytest.raises(UsageError, match="leaves no query to train on; the first dataset has 2"):
        hold_out([make_examples(("a", ["p"], []), ("b", ["p"], []))], 0.9, 0)


def test_some_examples_are_sent_to_workers(folder: Path) -> None:
    examples = opened("--dataset", folder, "--validation_fraction", 0.2).parts[0].examples
    again = pickle.loads(pickle.dumps(examples))
    assert (again.digest, ids(again)) == (examples.digest, ids(examples))


def test_rows_of_some_examples(ten: Examples) -> None:
    some = SomeExamples(ten, np.array([2, 5]))
    assert [len(some), some[1].query.id, len(some.others(1))] == [2, "q5", 0]
    with pytest.raises(IndexError):
        some[2]


@pytest.mark.parametrize("flag", ["--validation_split", "--validation_dataset"])
def test_another_validation_is_refused(folder: Path, flag: str) -> None:
    with pytest.raises(UsageError, match="validates on held-out training queries, not on dev"):
        opened("--dataset", folder, "--validation_fraction", 0.1, flag, "dev")


@pytest.mark.parametrize("share", ["0", "1", "nan"])
def test_shares_that_are_none(share: str) -> None:
    with pytest.raises(UsageError, match="must be above 0 and below 1"):
        parse_training(["--validation_fraction", share])


def test_validators_search_exactly_the_held_out_queries(run: TrackedRun, folder: Path) -> None:
    data = opened("--dataset", folder, "--validation_fraction", 0.2, seed=3)
    keep_held_out(run, data.held_out)
    run.log_params({"dataset": str(folder), "validation_split": data.split})
    keep_held_out(run, data.held_out)  # resumed
    found = EvalDatasets().open(run, Validation(EvalConfig(()), "val"))[1]
    assert found.split == HELD_OUT
    assert found.topics.digest == data.held_out.digest
    trained = set(ids(data.parts[0].examples))
    assert not trained & {query.id for query in found.topics.queries}
    assert len(trained) == 16
    named = EvalDatasets().open(run, Validation(EvalConfig(()), "val", split="dev"))[1]
    assert [query.id for query in named.topics.queries] == ["q20"]


def test_a_resumed_training_holds_out_the_same_queries(run: TrackedRun, folder: Path) -> None:
    first, second = (opened("--dataset", folder, "--validation_fraction", f) for f in (0.2, 0.3))
    keep_held_out(run, first.held_out)
    run.log_params({"validation_split": HELD_OUT})
    for other in (second.held_out, None):
        with pytest.raises(UsageError, match=r"--validation_fraction and --seed as before"):
            keep_held_out(run, other)


def test_a_run_without_held_out_queries(run: TrackedRun, folder: Path) -> None:
    with pytest.raises(TrackingError, match="fetching held-out queries of run"):
        held_out_topics(run)
    run.log_params({"validation_split": "dev"})
    data = opened("--dataset", folder, "--validation_fraction", 0.2)
    with pytest.raises(UsageError, match="trained without holding out these queries"):
        keep_held_out(run, data.held_out)


def _write_examples(path: Path, prefix: str) -> Path:
    records = [
        {
            "query_id": f"t{n}",
            "query": f"the query of {n}",
            "positive_passages": [{"docid": f"{prefix}{n}", "title": "", "text": f"passage {n}"}],
            "negative_passages": [],
        }
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_training_file_needs_no_judged_queries(run: TrackedRun, tmp_path: Path) -> None:
    file = _write_examples(tmp_path / "train.jsonl", "x")
    argv = ("--dataset", str(file), "--validation_fraction", "0.3")
    assert validated_dataset(parse_training(argv).data) == str(file)
    data = opened(*argv)
    keep_held_out(run, data.held_out)
    run.log_params({"dataset": str(file), "validation_split": data.split})
    found = EvalDatasets().open(run, Validation(EvalConfig(()), "val"))[1]
    assert found.topics.digest == data.held_out.digest
    assert len(found.corpus) == 10


def test_positives_must_be_passages_of_the_collection(folder: Path, tmp_path: Path) -> None:
    known = _write_examples(tmp_path / "known.jsonl", "p")
    argv = ("--dataset", folder, "--validation_fraction", 0.2, "--train_dir")
    assert len(opened(*argv, known).held_out.queries) == 2
    with pytest.raises(UsageError, match=r"such as 'x\d', are not in .* by --dataset instead"):
        opened(*argv, _write_examples(tmp_path / "unknown.jsonl", "x"))
