"""Names and files of suites."""

from pathlib import Path

import pytest

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.suites import Member, suite_members
from mlflow_dr.errors import UsageError


def test_nanobeir_has_thirteen_collections_in_each_language() -> None:
    members = suite_members("nanobeir")
    assert len(members) == 13
    repo = "sentence-transformers/NanoBEIR-en"
    dataset = {"dataset": f"{repo}/NanoSciFact", "keep_own_id": True}
    assert Member("NanoSciFact", dataset) in members
    assert suite_members("nanobeir-en") == suite_members(repo) == members
    assert suite_members("nanobeir-de") == suite_members("lightonai/NanoBEIR-de")
    (first, *_) = suite_members("someone/NanoBEIR-sr@v1")
    assert first.settings["dataset"] == "someone/NanoBEIR-sr/NanoClimateFEVER@v1"


def test_nanobeir_has_the_names_of_the_librarys_evaluator() -> None:
    from sentence_transformers.sentence_transformer.evaluation import nano_beir

    names = nano_beir.DATASET_NAME_TO_HUMAN_READABLE.values()
    assert sorted(member.name for member in suite_members("nanobeir")) == sorted(
        f"Nano{name}" for name in names
    )


def test_collections_are_joined_by_plus(tmp_path: Path) -> None:
    (tmp_path / "sea").mkdir()
    text = f"mteb/scifact@v1:test+{tmp_path}/sea + irds:beir/nfcorpus/test+demo+mteb/m/sw"
    assert [member.name for member in suite_members(text)] == [
        *("scifact", "sea", "beir_nfcorpus_test", "demo", "sw")
    ]
    assert len(suite_members("nanobeir+mteb/scifact")) == 14


def test_a_file_has_collections_and_their_settings(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text("a: mteb/scifact\nb: {dataset: demo, split: dev, query_prompt: 'query: '}\n")
    assert suite_members(str(file)) == [
        Member("a", {"dataset": "mteb/scifact"}),
        Member("b", {"dataset": "demo", "split": "dev", "query_prompt": "query: "}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "demo",
        "mteb/scifact",
        "irds:vaswani",
        "nanobeir-english",
        "a/NanoBEIR-de/NanoNQ",
        "a/NanoNQ",
    ],
)
def test_other_names_are_no_suites(text: str | None) -> None:
    assert suite_members(text) == []


def test_a_path_that_exists_is_no_suite(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert suite_members(str(tmp_path / "a+b")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a+", "a part without a name"),
        ("a/x+b/x", "two collections are called 'x'; name them in a YAML file"),
    ],
)
def test_malformed_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        suite_members(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- mteb/scifact\n", "expected keys with values"),
        ("{}\n", "no collections; expected names"),
        ("a: 3\n", "a is 3; expected a dataset"),
        ("a: {split: dev}\n", r"a is .*; expected a dataset, or settings with a dataset"),
        ("a: nanobeir\n", "a: nanobeir is a suite; name collections"),
        ("a: x\na: y\n", "key 'a' stands twice"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        suite_members(str(file))


def test_what_takes_one_collection_refuses_a_suite() -> None:
    with pytest.raises(UsageError, match="nanobeir is a suite of 13 collections; this takes one"):
        open_collection("nanobeir")
