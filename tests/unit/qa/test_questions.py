"""What is written for a run of all parts, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.demo import Pair, _write_pairs, write_questions
from mlflow_dr.config import ConfigError
from mlflow_dr.errors import MlflowDrError, UsageError
from mlflow_dr.qa.config import QaConfig
from mlflow_dr.qa.pipeline import answer_questions
from mlflow_dr.qa.questions import prepare_questions

TEXTS = {"p1": "The gull is white.", "p2": "The tug is red.", "p3": "A gull can fly."}


@pytest.fixture
def judged(beir_folder: Callable[..., Path]) -> Path:
    """Two splits that share an id, and questions of which one has no answer."""
    qrels = {"train": {"q": {"p1": 1}, "r": {"p2": 1}}, "dev": {"s": {"p2": 1}}}
    folder = beir_folder(TEXTS, {}, **qrels)
    queries = [
        {"_id": "q", "text": "what colour is the gull", "answers": ["white"]},
        {"_id": "r", "text": "what is it", "answers": []},
        {"_id": "s", "text": "what colour is the tug", "metadata": {"answers": ["red"]}},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """DPR's files without examples."""
    folder = tmp_path / "dpr"
    folder.mkdir()
    rows = "".join(f"{name}\t{text}\t\n" for name, text in TEXTS.items())
    (folder / "psgs.tsv").write_text(f"id\ttext\ttitle\n{rows}")
    (folder / "qas-train.tsv").write_text("colour of the gull\t['white']\ncolour\t['none']\n")
    (folder / "qas-test.tsv").write_text("colour of the tug\t['red']\n")
    return folder


def test_judged_questions_keep_judgements_and_answers(judged: Path, tmp_path: Path) -> None:
    found = prepare_questions(QaConfig(dataset=str(judged)), tmp_path / "out")
    assert found.is_judged
    assert found.training[:2] == ["--dataset", str(judged)]
    collection = open_collection(found.dataset)
    (query,) = collection.topics("train").queries
    assert (query.id, query.answers) == ("train-q", ("white",))
    assert collection.topics("train").qrels == {"train-q": {"p1": 1}}
    assert collection.topics("dev").qrels == {"dev-s": {"p2": 1}}
    assert len(collection.corpus()) == len(TEXTS)


def test_questions_without_examples_learn_from_bm25(asked: Path, tmp_path: Path) -> None:
    found = prepare_questions(QaConfig(dataset=str(asked)), tmp_path / "out")
    assert not found.is_judged
    collection = open_collection(found.dataset)
    assert [query.answers for query in collection.topics("dev").queries] == [("red",)]
    lines = (tmp_path / "out" / "examples.jsonl").read_text().splitlines()
    (example,) = map(json.loads, lines)
    assert example["positive_document_ids"] == ["p1"]
    assert set(example["negative_document_ids"]) <= {"p2", "p3"}
    assert "--train_dir" in found.training


def test_a_sample_has_the_size_that_is_asked(asked: Path, tmp_path: Path) -> None:
    config = QaConfig(dataset=str(asked), train_questions=1, seed=1)
    samples = [
        open_collection(prepare_questions(config, tmp_path / name).dataset).topics("train").queries
        for name in ("a", "b")
    ]
    assert [query.text for query in samples[0]] == [query.text for query in samples[1]]
    assert len(samples[0]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_split": "test"}, "the questions to measure on would be those to train on"),
        ({"train_split": "trian"}, "no split 'trian' of questions to train on"),
        ({"split": "dve"}, "no split 'dve'"),
        ({"dataset": "nothing"}, "no dataset 'nothing'"),
    ],
)
def test_a_split_that_is_missing_is_named(
    asked: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    config = QaConfig(**{"dataset": str(asked), **changed})
    with pytest.raises(UsageError, match=message):
        prepare_questions(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_questions_without_answers_are_refused(
    beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    qrels = {split: {"q": {"p1": 1}} for split in ("train", "dev")}
    folder = beir_folder(TEXTS, {"q": "gull"}, **qrels)
    with pytest.raises(MlflowDrError, match="none of 1 questions has an answer"):
        prepare_questions(QaConfig(dataset=str(folder)), tmp_path / "out")


@pytest.mark.parametrize("text", ["", "1 x", "0", "-1", "1.5"])
def test_numbers_of_passages_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="expected numbers of passages"):
        QaConfig(eval_top_docs=text)


def test_no_more_passages_are_read_than_are_found() -> None:
    with pytest.raises(ConfigError, match="60: only 50 passages are read"):
        QaConfig(eval_top_docs="1 60")


def test_the_demo_has_the_first_term_of_a_passage_as_the_answer(tmp_path: Path) -> None:
    pairs = [
        Pair("What the function is for.", "Nothing is ``None`` here but ``axis`` and ``out``."),
        Pair("What the class is for.", "There is no term in here."),
        Pair("What it does.", "It takes ``n`` or ``size``."),
    ]
    _write_pairs(tmp_path / "whole", pairs)
    rows = "".join(f"q{number}\tp{number}\t1\n" for number in range(len(pairs)))
    for split, judged in (("train", "q1\tp1\t1\n"), ("dev", rows)):
        path = tmp_path / "whole" / "qrels" / f"{split}.tsv"
        path.write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    write_questions(tmp_path / "qa", BeirFolder(tmp_path / "whole"))
    queries = [json.loads(q) for q in (tmp_path / "qa" / "queries.jsonl").read_text().splitlines()]
    assert [query["answers"] for query in queries] == [["axis"], ["size"]]


def test_a_model_that_does_not_exist_is_refused_before_there_is_a_run(
    asked: Path, tmp_path: Path, client: MlflowClient
) -> None:
    model, output = str(tmp_path / "nowhere"), tmp_path / "out"
    name = f"questions-{tmp_path.name}"
    config = QaConfig(
        dataset=str(asked),
        model=model,
        output=output,
        tracking_uri=client.tracking_uri,
        experiment_name=name,
    )
    with pytest.raises(UsageError, match="nowhere: not a directory"):
        answer_questions(config, [])
    assert client.get_experiment_by_name(name) is None
    assert not output.exists()
