"""What `--dataset` may name."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.collection import catalogue
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.catalogue import (
    ENTRIES,
    Entry,
    all_formats,
    open_collection,
    open_examples,
)
from mlflow_dr.collection.hub import HubDataset
from mlflow_dr.collection.irds import IrDataset
from mlflow_dr.errors import UsageError
from mlflow_dr.training.recipes import JUDGED, recipe_of


def test_a_folder_is_opened_as_beir_under_its_absolute_path(
    beir_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beir_folder({"p": "t"}, {"q": "t"}, folder="sea", dev={"q": {"p": 1}})
    monkeypatch.chdir(tmp_path)
    collection = open_collection("sea")
    assert isinstance(collection, BeirFolder)
    assert (collection.name, collection.splits) == (str(tmp_path / "sea"), ["dev"])


def test_the_home_folder_may_be_written_as_tilde(
    beir_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beir_folder({"p": "t"}, {"q": "t"}, folder="sea", dev={"q": {"p": 1}})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_collection("~/sea").splits == ["dev"]


def test_the_prefix_irds_opens_ir_datasets() -> None:
    collection = open_collection("irds:vaswani")
    assert isinstance(collection, IrDataset)
    assert collection.name == "irds:vaswani"


def test_a_catalogue_name_comes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sea").mkdir()
    monkeypatch.chdir(tmp_path)
    opened = BeirFolder(tmp_path, name="from the catalogue")
    monkeypatch.setattr(catalogue, "ENTRIES", (Entry("sea", "", "", lambda: opened),))
    assert open_collection("sea") is opened


@pytest.mark.parametrize("name", ["nowhere", "", "./nowhere", "/nowhere/at/all"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"msmarco, nq, trivia, a folder.*irds:<id>, or owner/name"
    ):
        open_collection(name)


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean 'msmarco'"):
        open_collection("msmacro")


def test_owner_and_name_are_a_repository_of_the_hub_unless_they_are_a_folder(
    beir_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    collection = open_collection("owner/name")
    assert isinstance(collection, HubDataset)
    assert collection.name == "owner/name"
    beir_folder({"p": "t"}, {"q": "t"}, folder="owner/name", dev={"q": {"p": 1}})
    assert isinstance(open_collection("owner/name"), BeirFolder)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("Tevatron/wikipedia-nq", "Tevatron/wikipedia-nq"),
        ("mteb/nq/en@v1:dev", "mteb/nq/en@v1:dev"),
        (
            "Tevatron/msmarco-passage",
            "Tevatron/msmarco-passage and Tevatron/msmarco-passage-corpus; ir_datasets "
            "msmarco-passage/dev/small",
        ),
    ],
)
def test_the_source_of_a_name(name: str, source: str) -> None:
    collection = open_collection(name)
    assert (collection.name, collection.source) == (name, f"Hugging Face {source}")


def test_examples_of_every_kind_of_source(
    beir_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beir_folder({"p": "t"}, {"q": "t"}, train={"q": {"p": 1}})
    entry = Entry("sea", "", "", lambda: BeirFolder(folder))
    monkeypatch.setattr(catalogue, "ENTRIES", (entry,))
    for source in ("sea", str(folder), folder):
        assert open_examples(source)[0].positives.tolist() == [0]


def test_every_entry_says_what_it_is() -> None:
    assert all(entry.sizes and entry.source for entry in ENTRIES)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert all(form.pattern and form.description for form in all_formats())


def test_a_name_is_looked_up_in_the_folders_of_a_variable(
    beir_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, dev={"q": {"p": 1}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no dataset 'collection'"):
        open_collection("collection")
    monkeypatch.setenv("MLFLOW_DR_DATA", os.pathsep.join([str(tmp_path / "none"), str(tmp_path)]))
    assert open_collection("collection").name == str(folder)
    assert recipe_of("collection") is JUDGED
    with pytest.raises(UsageError, match="no dataset ''"):
        open_collection("")
