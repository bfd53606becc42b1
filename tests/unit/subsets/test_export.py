"""Subsets written down are collections that open again."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mlflow_dr.cli.collections import subset_command
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import plain_tokens
from mlflow_dr.errors import UsageError
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.subsets.strategies import SubsetSources
from mlflow_dr.subsets.subset import Subset, make_subset, write_subset


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow", "q3": "the tide at noon"},
        dev={"q1": {"p0": 1, "p1": 0}, "q2": {"p3": 2}, "q3": {"p5": 1}},
    )


@pytest.fixture
def subset(folder: Path) -> Subset:
    collection = open_collection(str(folder))
    spec = parse_subset("random:4+queries:2", judged="all")
    return make_subset(spec, SubsetSources(collection.corpus(), collection.topics("dev")))


def test_a_written_beir_folder_opens_as_the_same_collection(subset: Subset, tmp_path: Path) -> None:
    write_subset(tmp_path / "small", subset, "dev")
    opened = open_collection(str(tmp_path / "small"))
    assert len(opened.corpus()) == len(subset)
    assert opened.topics("dev").digest == subset.topics.digest
    table = pq.read_table(tmp_path / "small" / "subset.parquet")
    assert sorted(table["passage_id"].to_pylist()) == sorted(opened.corpus().ids.to_pylist())
    with pytest.raises(UsageError, match="exists already"):
        write_subset(tmp_path / "small", subset, "dev")


def test_shards_are_nearly_equal(subset: Subset, tmp_path: Path) -> None:
    write_subset(tmp_path / "small", subset, "dev", shards=3)
    files = sorted((tmp_path / "small").glob("corpus-*"))
    assert [file.name for file in files] == [f"corpus-{n:05}-of-00003.jsonl" for n in range(3)]
    counts = [len(file.read_text().splitlines()) for file in files]
    assert sum(counts) == len(subset)
    assert max(counts) - min(counts) <= 1
    with pytest.raises(UsageError, match="expected 1 to"):
        write_subset(tmp_path / "other", subset, "dev", shards=1000)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "collection") == [
        "small"
    ]


@pytest.mark.parametrize("tokenised", [False, True])
def test_asyncvals_files_open_too(
    subset: Subset, tmp_path: Path, make_tiny: Callable[..., Encoder], tokenised: bool
) -> None:
    save_encoder(tmp_path / "encoder", make_tiny())
    tokens = plain_tokens(str(tmp_path / "encoder")) if tokenised else None
    directory = tmp_path / "small"
    write_subset(directory, subset, "dev", "asyncval", shards=2, tokens=tokens)
    first = json.loads((directory / "candidates" / "split00.jsonl").read_text().splitlines()[0])
    assert isinstance(first["text"], list if tokenised else str)
    files = f"queries={directory}/queries.dev.jsonl&qrels={directory}/qrels.dev.tsv"
    name = f"asyncval:{directory}/candidates?{files}"
    opened = open_collection(name)
    (split,) = opened.splits
    assert len(opened.corpus()) == len(subset)
    assert opened.topics(split).qrels == subset.topics.qrels


@pytest.mark.parametrize("layout", ["beir", "asyncval"])
def test_a_split_with_a_slash(subset: Subset, tmp_path: Path, layout: str) -> None:
    directory = tmp_path / "small"
    write_subset(directory, subset, "dev/small", layout)
    names = ("queries.dev_small.jsonl", "qrels.dev_small.tsv")
    queries, qrels = (directory / name for name in names)
    files = f"asyncval:{directory}/candidates?queries={queries}&qrels={qrels}"
    opened = open_collection(str(directory) if layout == "beir" else files)
    (split,) = opened.splits
    assert split.endswith("dev_small")
    assert opened.topics(split).qrels == subset.topics.qrels


def test_the_command(folder: Path, tmp_path: Path) -> None:
    argv = ["--dataset", folder, "--subset", "bm25@1", "--output", tmp_path / "small"]
    result = CliRunner().invoke(subset_command, list(map(str, argv)))
    assert result.exit_code == 0, result.output
    assert "passages (judged 3, bm25@1" in result.output
    assert set(open_collection(str(tmp_path / "small")).corpus().ids.to_pylist()) >= {"p0", "p3"}


def test_subsets_by_query_cannot_be_written_as_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "top.tsv").write_text("q1\tp1\t1\n")
    argv = ["--dataset", folder, "--subset", f"rerank:{tmp_path}/top.tsv@1", "--output"]
    result = CliRunner().invoke(subset_command, [*map(str, argv), str(tmp_path / "small")])
    assert isinstance(result.exception, UsageError)
    assert "write ranking:FILE@K instead" in str(result.exception)


def test_no_such_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        plain_tokens(str(tmp_path / "nothing"))
