"""Dataset formats: one that another package adds, and the interface that all of them share."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlflow_dr.cli.collections import datasets_command
from mlflow_dr.collection.catalogue import (
    Collection,
    chosen_split,
    dataset_formats,
    open_collection,
    open_examples,
)
from mlflow_dr.errors import DataError, UsageError

# the example of docs/extending.md: questions and answers in a file of two columns
PACKAGE = '''
"""Datasets in a `.faq` file: a question and its answer on each line, separated by a tab."""

from pathlib import Path

from mlflow_dr.collection.corpus import cached_corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.catalogue import check_split
from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.collection.qrels import checked_topics
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.files import decoded, read_lines


class FaqFile:
    splits = ("dev",)

    def __init__(self, path):
        self.path = path
        self.name = f"faq:{path}"
        self.source = f"questions and answers of {path}"

    def rows(self):
        for number, line in read_lines(self.path):
            cells = decoded(line, self.path, number).split("\\t")
            if len(cells) != 2:
                raise DataError(f"{self.path}:{number}: {len(cells)} columns, expected 2")
            yield f"q{number}", f"a{number}", *cells

    def corpus(self):
        passages = (Passage(answer_id, "", answer) for _, answer_id, _, answer in self.rows())
        return cached_corpus(f"faq:{state_of(self.path)}", passages)

    def topics(self, split):
        check_split(self, split)
        rows = list(self.rows())
        queries = [Query(query_id, question) for query_id, _, question, _ in rows]
        qrels = {query_id: {answer_id: 1} for query_id, answer_id, _, _ in rows}
        return checked_topics(str(self.path), queries, qrels, self.corpus())

    def examples(self):
        return JudgedExamples(self.topics("dev"), self.corpus())


class FaqFormat:
    pattern = "faq:FILE"
    description = "a .faq file: a question and its answer on each line, separated by a tab"

    @staticmethod
    def recognises(path):
        return path.suffix == ".faq"

    @staticmethod
    def open(location):
        path = Path(location).expanduser().resolve()
        if not path.is_file():
            raise UsageError(f"faq:{location}: no such file")
        return FaqFile(path)
'''


@pytest.fixture
def package(install_package: Callable[..., Path]) -> Path:
    """The package, next to one that cannot be imported."""
    return install_package(
        {"outside_faq.py": PACKAGE},
        "[mlflow_dr.dataset_formats]\n"
        "faq = outside_faq:FaqFormat\nbroken = outside_nowhere:Format\n",
        dataset_formats,
    )


@pytest.fixture
def faq(tmp_path: Path) -> Path:
    path = tmp_path / "ships.faq"
    path.write_text("what floats\tcork floats\nwhat sinks\tiron sinks\n")
    return path


def test_a_format_of_another_package_opens_by_its_prefix(package: Path, faq: Path) -> None:
    collection = open_collection(f"faq:{faq}")
    assert [passage.text for passage in collection.corpus()] == ["cork floats", "iron sinks"]
    assert collection.topics("dev").qrels == {"q1": {"a1": 1}, "q2": {"a2": 1}}
    assert len(open_examples(f"faq:{faq}")) == 2


def test_a_format_of_another_package_recognises_a_file(
    package: Path, faq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(faq.parent)
    assert open_collection("ships.faq").name == f"faq:{faq}"


def test_a_package_is_imported_only_when_its_format_may_be_needed(package: Path) -> None:
    open_collection("irds:vaswani")
    assert "outside_faq" not in sys.modules


def test_a_broken_package_is_logged_and_the_formats_of_others_work(
    package: Path, faq: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_collection(str(faq)).splits
    (message,) = caplog.messages
    assert "'broken' cannot be imported from outside_nowhere:Format" in message
    with pytest.raises(UsageError, match="'broken' cannot be imported"):
        open_collection("broken:x")


def test_errors_of_the_format_name_the_line(package: Path, faq: Path) -> None:
    faq.write_text("what floats\tcork floats\nno answer\n")
    with pytest.raises(DataError, match=r"ships\.faq:2: 1 columns, expected 2"):
        open_collection(str(faq)).corpus()


def test_the_format_is_listed_and_suggested(package: Path) -> None:
    listed = CliRunner().invoke(datasets_command)
    assert listed.exit_code == 0
    assert "faq:FILE\n          from a .faq file: a question" in listed.output
    with pytest.raises(UsageError, match="did you mean 'faq'"):
        open_collection("fac:ships")


def test_a_format_is_registered_by_a_decorator(
    package: Path, faq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "outside-1.0.dist-info" / "entry_points.txt").write_text("")
    with pytest.raises(UsageError, match="no dataset 'faq:"):
        open_collection(f"faq:{faq}")
    from outside_faq import FaqFormat  # type: ignore[import-not-found]

    dataset_formats.register("faq")(FaqFormat)
    assert open_collection(str(faq)).name == f"faq:{faq}"
    with pytest.raises(UsageError, match="already registered"):
        dataset_formats.register("faq")(object())  # type: ignore[arg-type]


# the interface, in every format that needs no network


def _beir(folder: Path) -> str:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "a1", "text": "cork floats"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what floats"}\n')
    for split in ("dev", "train"):
        (folder / f"qrels/{split}.tsv").write_text("q1\ta1\t1\n")
    return str(folder)


def _dpr(folder: Path) -> str:
    record = {"question": "what floats", "positive_ctxs": [{"title": "", "text": "cork floats"}]}
    (folder / "nq-dev.json").write_text(json.dumps([record]))
    return str(folder / "nq-dev.json")


def _pool(folder: Path) -> str:
    return f"pool:{_dpr(folder)}"


def _asyncval(folder: Path) -> str:
    (folder / "corpus.json").write_text('{"text_id": "a1", "text": "cork floats"}\n')
    (folder / "dev.json").write_text('{"text_id": "q1", "text": "what floats"}\n')
    (folder / "qrels.tsv").write_text("q1\t0\ta1\t1\n")
    files = f"queries={folder}/dev.json&qrels={folder}/qrels.tsv"
    return f"asyncval:{folder}/corpus.json?{files}"


def _outside(folder: Path) -> str:
    (folder / "ships.faq").write_text("what floats\tcork floats\n")
    return f"faq:{folder}/ships.faq"


@pytest.fixture(params=[_beir, _dpr, _pool, _asyncval, _outside], ids=lambda make: make.__name__)
def collection(request: pytest.FixtureRequest, package: Path, tmp_path: Path) -> Collection:
    make: Callable[[Path], str] = request.param
    folder = tmp_path / "data"
    folder.mkdir()
    return open_collection(make(folder))


def test_the_name_opens_the_same_dataset_from_another_folder(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = open_collection(collection.name)
    assert (again.name, again.source) == (collection.name, collection.source)
    assert list(again.splits) == list(collection.splits)
    assert again.corpus().digest == collection.corpus().digest


def test_queries_are_judged_on_passages_of_the_corpus(collection: Collection) -> None:
    ids = set(collection.corpus().ids.to_pylist())
    for split in collection.splits:
        queries, qrels = collection.topics(split)
        assert {query.id for query in queries} == set(qrels)
        assert all(set(judged) <= ids for judged in qrels.values())
        assert collection.topics(split).digest == collection.topics(split).digest
    with pytest.raises(UsageError, match="'nowhere'"):
        collection.topics("nowhere")
    if not collection.splits:
        with pytest.raises(UsageError, match="no judged queries"):
            chosen_split(collection, None)


def test_examples_are_rows_of_their_corpus_and_go_to_other_processes(
    collection: Collection,
) -> None:
    if collection.name.startswith("asyncval:"):
        with pytest.raises(UsageError, match="no training examples"):
            collection.examples()
        return
    examples = collection.examples()
    query, positives, negatives, _ = examples[0]
    assert query.text == "what floats"
    assert [examples.passages[row].text for row in positives] == ["cork floats"]
    assert positives.dtype == negatives.dtype == np.int64
    assert examples.negative_counts().tolist() == [len(negatives)]
    assert len(examples.digest) <= 36
    again = pickle.loads(pickle.dumps(examples))
    assert (again.digest, len(again)) == (examples.digest, len(examples))
