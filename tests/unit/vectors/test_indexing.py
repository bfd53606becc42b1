"""Indexing the vectors of a folder, with queries, and with a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.cli.vectors import index_command
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import publish
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.vectors.config import EncodeConfig, IndexConfig
from mlflow_dr.vectors.encoding import encode
from mlflow_dr.vectors.indexing import index

Encode = Callable[..., Path]


@pytest.fixture
def encoded(
    beir_folder: Callable[..., Path],
    texts: list[str],
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
) -> Encode:
    """A function that encodes 40 passages, or 10 queries, into a folder."""
    corpus = {f"p{n}": " ".join(texts[: n % 5 + 1]) + f" {n}" for n in range(40)}
    queries = {f"q{n}": text for n, text in enumerate(texts)}
    dataset = beir_folder(corpus, queries, dev={q: {"p1": 1} for q in queries})
    save_encoder(tmp_path / "encoder", make_tiny())

    def made(name: str, split: str | None = None, encoder: str = "", shard: str = "0/1") -> Path:
        config = EncodeConfig(
            encoder=encoder or str(tmp_path / "encoder"),
            dataset=str(dataset),
            split=split,
            output=tmp_path / name,
            shard=shard,
            device="cpu",
            dtype="fp32",
        )
        encode(config)
        return tmp_path / name

    return made


def test_shards_are_indexed_and_measured_on_queries(encoded: Encode, tmp_path: Path) -> None:
    for shard in range(2):
        passages = encoded("passages", shard=f"{shard}/2")
    queries = encoded("queries", split="dev")
    config = IndexConfig(
        vectors=passages, output=tmp_path / "index", factory="IVF4,Flat", queries=queries
    )
    manifest = index(config)
    assert (manifest["passages"], manifest["queries"], manifest["queries_are"]) == (40, 10, "given")
    assert manifest["recall_at_100"] >= 0.99
    assert manifest["vectors"]["manifest"]["shards"] == 2
    assert len((tmp_path / "index" / "docid").read_text().splitlines()) == 40


def test_the_command_prints_recall_and_speed(
    encoded: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(encoded("passages")), "--output", str(tmp_path / "index"), "--factory", "exact"]
    index_command.main(argv, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["Flat, 40 passages", "recall@10\t1.0000", "recall@100\t1.0000"]
    assert "times as fast as exact search" in lines[3]
    assert lines[4] == f"wrote {tmp_path / 'index'}"


def test_a_recall_that_cannot_be_reached_is_said(
    encoded: Encode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passages = encoded("passages")
    index(IndexConfig(vectors=passages, output=tmp_path / "coarse", factory="SQ4", recall=1.0))
    assert len(caplog.messages) == 1
    assert "below --recall 1, and more effort does not help" in caplog.messages[0]


def test_the_index_is_stored_with_the_checkpoints_run(
    encoded: Encode, run: TrackedRun, tmp_path: Path
) -> None:
    model = publish(run, tmp_path / "encoder", 30)
    passages = encoded("passages", encoder=f"models:/{model}")
    index(IndexConfig(vectors=passages, output=tmp_path / "index", log=True))
    folder = f"indexes/step-00000030-{model}/index"
    entries = run.client.list_artifacts(run.id, folder)
    assert [Path(entry.path).name for entry in entries] == ["docid", "index", "manifest.json"]


def test_what_does_not_fit_is_refused(
    encoded: Encode, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    passages, queries = encoded("passages"), encoded("queries", split="dev")
    save_encoder(tmp_path / "other", make_tiny(seed=1))
    others = encoded("others", split="dev", encoder=str(tmp_path / "other"))
    for values, message in (
        ({"vectors": queries}, "vectors of queries"),
        ({"vectors": passages, "queries": others}, "another encoder"),
        ({"vectors": passages, "log": True}, "--log needs vectors of a published checkpoint"),
        ({"vectors": tmp_path / "nothing"}, "no such folder"),
        ({"vectors": passages, "output": passages}, "exists already"),
    ):
        with pytest.raises(UsageError, match=message):
            index(IndexConfig(**{"output": tmp_path / "index", **values}))
    assert not (tmp_path / "index").exists()
    shutil.rmtree(queries)
    with pytest.raises(UsageError, match="no such folder"):
        index(IndexConfig(vectors=passages, output=tmp_path / "index", queries=queries))
