"""Collections as MLflow's datasets, in a real store."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.data.dataset_source_registry import (
    get_dataset_source_from_json,
    resolve_dataset_source,
)

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.datasets import CollectionSource, from_dense_retrieval, shown_name
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "ships at night", "q2": "salt on iron", "q3": "gulls"},
        dev={"q1": {"p0": 1, "p1": 0}, "q2": {"p2": 1}},
        test={"q3": {"p3": 2}},
    )


def test_mlflow_has_the_constructor_and_the_source() -> None:
    assert mlflow.data.from_dense_retrieval is from_dense_retrieval
    assert mlflow.data.sources.CollectionSource is CollectionSource


def test_a_split_has_name_digest_and_sizes(folder: Path) -> None:
    dataset = mlflow.data.from_dense_retrieval(str(folder))
    assert dataset.name == str(folder)
    assert len(dataset.digest) == 16
    assert dataset.profile == {"passages": 10, "queries": 2, "judgements": 3, "split": "dev"}
    assert json.loads(dataset.to_dict()["profile"]) == dataset.profile


def test_the_digest_is_of_the_contents(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    dev = from_dense_retrieval(folder)
    assert from_dense_retrieval(copied, "dev").digest == dev.digest
    assert from_dense_retrieval(folder, "test").digest != dev.digest
    qrels = (copied / "qrels" / "dev.tsv").read_text()
    (copied / "qrels" / "dev.tsv").write_text(qrels.replace("q2\tp2\t1", "q2\tp4\t1"))
    assert from_dense_retrieval(copied, "dev").digest != dev.digest


def test_name_and_digest_may_be_given(folder: Path) -> None:
    collection = open_collection(str(folder))
    dataset = from_dense_retrieval(collection, "test", name="sea", digest="abc")
    assert (dataset.name, dataset.digest) == ("sea", "abc")
    assert dataset.source.collection == str(folder)


def test_an_input_of_a_run_leads_back_to_the_collection(run: TrackedRun, folder: Path) -> None:
    with mlflow.start_run(run_id=run.id):
        mlflow.log_input(from_dense_retrieval(folder, "test"), context="validation")
    (entry,) = run.fetch().inputs.dataset_inputs
    assert [tag.value for tag in entry.tags] == ["validation"]
    assert json.loads(entry.dataset.profile)["queries"] == 1
    source = mlflow.data.get_source(entry)
    assert isinstance(source, CollectionSource)
    assert source.split == "test"
    again = from_dense_retrieval(source.load(), source.split)
    assert again.digest == entry.dataset.digest


def test_trainers_and_validators_write_the_same_kind(run: TrackedRun, folder: Path) -> None:
    dataset = from_dense_retrieval(folder)
    profile = {"passages": 10, "queries": 2, "split": "dev"}
    source = dataset.collection.source
    run.log_collection(str(folder), "abc", source, profile, context="validation val")
    (entry,) = run.fetch().inputs.dataset_inputs
    written = dataset.to_dict()
    assert (entry.dataset.source_type, entry.dataset.source) == (
        written["source_type"],
        written["source"],
    )
    assert mlflow.data.get_source(entry).load().splits == dataset.collection.splits


def test_a_source_is_read_from_what_it_wrote() -> None:
    source = CollectionSource("irds:vaswani", "test", "ir_datasets vaswani")
    again = get_dataset_source_from_json(source.to_json(), source._get_source_type())
    assert vars(again) == vars(source)
    with pytest.raises(UsageError, match="names no collection; expected key 'collection'"):
        CollectionSource.from_dict({"source": "here"})


def test_only_unmistakable_sources_are_taken_as_collections(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dataset_source("irds:vaswani").collection == "irds:vaswani"
        opened = resolve_dataset_source(open_collection(str(folder)))
        assert opened.collection == str(folder)
    for raw in (folder, str(folder), "s3://bucket/corpus.jsonl", "demo", {"name": "demo"}):
        assert not CollectionSource._can_resolve(raw)


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no split 'train'; it has: dev, test"):
        from_dense_retrieval(folder, "train")


def test_a_name_that_is_too_long_for_mlflow_is_cut_and_stays_unique() -> None:
    first, second = (shown_name(f"asyncval:{'x' * 600}{end}") for end in "ab")
    assert len(first) == len(second) == 500
    assert first != second
    assert shown_name("demo") == "demo"


def test_mlflow_alone_imports_nothing_heavy_of_ours() -> None:
    code = (
        "import sys, mlflow.data; mlflow.data.from_dense_retrieval; import mlflow.models as m; "
        "assert 'dense_retrieval' in m.list_evaluators(); "
        "print([name for name in ('torch', 'transformers', 'faiss', 'ir_datasets') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
