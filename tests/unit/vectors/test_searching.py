"""Searching files of vectors: the same bits as an evaluation, and as NumPy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.collection.corpus import tie_ranks
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.vectors import open_vectors
from mlflow_dr.validation.evaluate import evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig
from mlflow_dr.vectors import searching
from mlflow_dr.vectors.config import ConvertConfig, EncodeConfig, SearchConfig
from mlflow_dr.vectors.encoding import encode
from mlflow_dr.vectors.searching import convert, exact_search, search


@pytest.fixture
def folder(
    beir_folder: Callable[..., Path], make_tiny: Callable[..., Encoder], texts: list[str]
) -> Path:
    """60 passages, a fifth of them copies, and 10 queries; beside the folder, an encoder."""
    corpus = {f"p{n}": " ".join(texts[n % 7 : n % 7 + 3]) + f" {n % 48}" for n in range(60)}
    queries = {f"q{n}": text for n, text in enumerate(texts)}
    made = beir_folder(corpus, queries, dev={f"q{n}": {f"p{n}": 1, "p7": 2} for n in range(9)})
    save_encoder(made.parent / "encoder", make_tiny(pooling="mean", query_prompt="find "))
    return made


def encoded(folder: Path, output: str, **others: Any) -> Path:
    path = folder.parent / output
    shards = others.pop("shards", 1)
    values = {"dataset": str(folder), "device": "cpu", "dtype": "fp32", "tokens_per_batch": 4096}
    for shard in range(shards):
        encode(
            EncodeConfig(
                encoder=str(folder.parent / "encoder"),
                output=path,
                shard=f"{shard}/{shards}",
                **{**values, **others},
            )
        )
    return path


def searched(source: Path, **others: Any) -> dict[str, float]:
    values = {"device": "cpu", "measures": "mrr@10 recall@5", **others}
    found = search(SearchConfig(sources=(source,), **values))
    return {str(name): value for name, value in found.measures.items()}


@pytest.fixture
def evaluated(folder: Path) -> tuple[bytes, dict[str, float]]:
    """The ranking of an evaluation of 20 passages, and its measures."""
    report = evaluate_encoder(
        EvaluateConfig(
            encoder=str(folder.parent / "encoder"),
            dataset=str(folder),
            device="cpu",
            dtype="fp32",
            depth=20,
            measures="mrr@10 recall@5",
            ranking=folder.parent / "evaluated.trec",
        )
    )
    measures = {str(name): value for name, value in report.measures.items()}
    return (folder.parent / "evaluated.trec").read_bytes(), measures


def test_vectors_know_their_collection_from_any_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    vectors = encoded(folder, "vectors", dataset=folder.name)
    monkeypatch.chdir(tmp_path)
    assert searched(vectors, split="dev").keys() == {"mrr@10", "recall@5"}


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_rows_and_scores_are_those_of_an_evaluation(
    folder: Path,
    evaluated: tuple[bytes, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    file_format: str,
    shards: int,
) -> None:
    monkeypatch.setattr(searching, "passages_per_chunk", lambda *_: 11)
    monkeypatch.setattr(searching, "queries_per_merge", lambda _: 3)
    monkeypatch.setattr(searching, "QUERIES_PER_PART", 3)
    queries = encoded(folder, "queries", split="dev")
    passages = encoded(folder, "passages", shards=shards, file_format=file_format)
    output = folder.parent / "found.trec"
    assert searched(passages, queries=queries, depth=20, output=output) == evaluated[1]
    assert output.read_bytes() == evaluated[0]
    assert searched(passages, split="dev", depth=20, output=output, force=True) == evaluated[1]
    assert output.read_bytes() == evaluated[0]


@pytest.mark.parametrize("shards", [1, 2, 7, 100])
@pytest.mark.parametrize("file_format", ["trec", "tevatron"])
def test_merged_shards_are_the_whole(
    folder: Path, evaluated: tuple[bytes, dict[str, float]], shards: int, file_format: str
) -> None:
    queries, passages = encoded(folder, "queries", split="dev"), encoded(folder, "passages")
    parts = [folder.parent / f"part{shard}" for shard in range(shards)]
    for shard, part in enumerate(parts):
        found = searched(
            passages,
            **{"queries": queries, "depth": 20, "output": part, "file_format": file_format},
            shard=f"{shard}/{shards}",
        )
        assert shards == 1 or found == {}
    output = folder.parent / "merged"
    measures = search(
        SearchConfig(
            sources=tuple(parts),
            merge=True,
            depth=20,
            dataset=str(folder),
            measures="mrr@10 recall@5",
            output=output,
        )
    ).measures
    assert output.read_bytes() == evaluated[0]
    assert {str(name): value for name, value in measures.items()} == evaluated[1]


def test_shards_may_be_in_folders_of_their_own(
    folder: Path, evaluated: tuple[bytes, dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    queries, everything = encoded(folder, "queries", split="dev"), encoded(folder, "all", shards=3)
    shards = []
    for shard in range(3):
        path = folder.parent / f"passages{shard}"
        path.mkdir()
        for file in everything.glob(f"*-0000{shard}-of-00003*"):
            shutil.copy(file, path)
        shards.append(path)
    values = {"queries": queries, "device": "cpu", "depth": 20, "measures": "mrr@10 recall@5"}
    whole = folder.parent / "whole"
    search(SearchConfig(sources=tuple(reversed(shards)), output=whole, **values))
    assert whole.read_bytes() == evaluated[0]

    with pytest.raises(UsageError, match=r"2 are missing \(1, 2\)"):
        search(SearchConfig(sources=(shards[0],), **values))
    with pytest.raises(UsageError, match="another folder has manifest-00000-of-00003"):
        search(SearchConfig(sources=(shards[0], everything), **values))
    with pytest.raises(UsageError, match="no manifest"):
        search(SearchConfig(sources=(shards[0], folder), **values))
    parts = [folder.parent / f"part{shard}" for shard in range(3)]
    for path, part in zip(shards, parts, strict=True):
        found = search(SearchConfig(sources=(path,), partial=True, output=part, **values))
        assert found.measures == {}
    assert caplog.messages[-1].startswith("searching without 2 of 3 shards")
    merged = folder.parent / "merged"
    search(SearchConfig(sources=tuple(parts), merge=True, depth=20, output=merged))
    assert merged.read_bytes() == evaluated[0]


def test_queries_may_have_another_length_than_was_said_with_the_passages(folder: Path) -> None:
    passages = encoded(folder, "passages", p_max_len=16)
    queries = encoded(folder, "queries", split="dev", q_max_len=12, query_prompt="get ")
    assert searched(passages, queries=queries)
    short, long = (
        encoded(folder, f"cut{length}", shards=2, p_max_len=length) for length in (8, 16)
    )
    for part, shard in ((short, 1), (long, 0)):
        for file in part.glob(f"*-0000{shard}-of-00002*"):
            file.unlink()
    with pytest.raises(DataError, match="pooling, prompt or length"):
        open_vectors(short, long)


def test_files_of_texts_have_the_vectors_of_their_collection(
    folder: Path, evaluated: tuple[bytes, dict[str, float]]
) -> None:
    base = folder.parent
    paths = {}
    for name, texts in (("corpus", {}), ("queries", {"texts_are_queries": True})):
        paths[name] = base / f"of-{name}"
        encode(
            EncodeConfig(
                encoder=str(base / "encoder"),
                texts=(folder / f"{name}.jsonl",),
                output=paths[name],
                **{"device": "cpu", "dtype": "fp32", "tokens_per_batch": 4096, **texts},
            )
        )
    values = {"queries": paths["queries"], "depth": 20, "output": base / "found"}
    assert searched(paths["corpus"], **values) == {}
    judged = {line.split()[0] for line in evaluated[0].decode().splitlines()}
    lines = (base / "found").read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if line.split()[0] in judged).encode() == evaluated[0]
    measured = searched(paths["corpus"], dataset=str(folder), split="dev", depth=20)
    assert measured == evaluated[1]


def test_a_ranking_is_converted(folder: Path, evaluated: tuple[bytes, dict[str, float]]) -> None:
    own, base = folder.parent / "evaluated.trec", folder.parent
    for layout, source in (("tevatron", own), ("trec", base / "tevatron"), ("msmarco", own)):
        count = convert(ConvertConfig(input=source, output=base / layout, file_format=layout))
        assert count == 9
    assert (base / "trec").read_bytes() == evaluated[0]
    assert (base / "msmarco").read_text().splitlines()[0].split("\t")[2] == "1"
    (base / "same").write_text("q1\tq1\t2.5\nq1\tp1\t1.5\n")
    convert(ConvertConfig(input=base / "same", output=base / "other", remove_query=True))
    assert (base / "other").read_text() == "q1 Q0 p1 1 1.5 mlflow_dr\n"
    with pytest.raises(UsageError, match="exists already"):
        convert(ConvertConfig(input=own, output=base / "other"))


def test_the_layouts_of_a_ranking(folder: Path) -> None:
    passages = encoded(folder, "passages")
    lines = {}
    for layout in ("trec", "msmarco", "tevatron"):
        output = folder.parent / layout
        searched(passages, output=output, file_format=layout, depth=10)
        lines[layout] = output.read_text().splitlines()
    trec = [line.split(" ") for line in lines["trec"]]
    assert lines["msmarco"] == [f"{line[0]}\t{line[2]}\t{line[3]}" for line in trec]
    assert lines["tevatron"] == [f"{line[0]}\t{line[2]}\t{line[4]}" for line in trec]
    assert len(trec) == 90


def test_every_id_of_an_exhaustive_search_by_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    passages = rng.standard_normal((500, 32)).astype(np.float32)
    passages[400:] = passages[:100]
    queries = rng.standard_normal((30, 32)).astype(np.float32)
    ids = pa.array([f"d{n}" for n in rng.permutation(500)])
    vectors = pa.array(list(passages), pa.list_(pa.float32(), 32))
    pq.write_table(pa.table({"docid": ids, "vector": vectors}), tmp_path / "a.parquet")
    opened = open_vectors(tmp_path)
    scores = (queries[:, None] * passages).sum(axis=2)
    ranks = tie_ranks(opened.ids)
    for depth in range(1, 40):
        rows, found = exact_search(queries, opened, depth, "cpu", "auto")
        expected = np.stack([np.lexsort((ranks, -line))[:depth] for line in scores])
        np.testing.assert_array_equal(rows, expected)
        at_rows = np.take_along_axis(scores, rows, axis=1)
        np.testing.assert_allclose(found, at_rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_passages", [1, 2, 5])
def test_a_depth_beyond_the_corpus(
    beir_folder: Callable[..., Path], folder: Path, n_passages: int
) -> None:
    few = beir_folder(
        {f"p{n}": f"a ship {n}" for n in range(n_passages)},
        {"q": "ship"},
        "few",
        dev={"q": {"p0": 1}},
    )
    path = encoded(folder, "few-vectors", dataset=str(few), shards=3)
    searched(path, depth=1000, output=folder.parent / "few.trec")
    lines = (folder.parent / "few.trec").read_text().splitlines()
    assert sorted(line.split()[2] for line in lines) == [f"p{n}" for n in range(n_passages)]


def test_vectors_of_another_encoder_are_refused(
    folder: Path, make_tiny: Callable[..., Encoder]
) -> None:
    passages = encoded(folder, "passages")
    shutil.rmtree(folder.parent / "encoder")
    save_encoder(folder.parent / "encoder", make_tiny(pooling="mean", seed=3))
    queries = encoded(folder, "queries", split="dev")
    for others in ({"queries": queries}, {"split": "dev"}):
        with pytest.raises(UsageError, match="encoded by another encoder"):
            searched(passages, **others)


def test_vectors_of_another_corpus_are_refused(
    folder: Path, beir_folder: Callable[..., Path]
) -> None:
    passages, queries = encoded(folder, "passages"), encoded(folder, "queries", split="dev")
    other = beir_folder({"p1": "another text"}, {"q1": "text"}, "other", dev={"q1": {"p1": 1}})
    with pytest.raises(UsageError, match="vectors of another corpus"):
        searched(passages, queries=queries, dataset=str(other))


def test_vectors_of_other_programs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((5, 128)).astype(np.float32)
    for name, ids in (("docs", [f"p{n}" for n in range(5)]), ("asks", [f"q{n}" for n in range(5)])):
        table = pa.table({"_id": pa.array(ids), "embedding": pa.array(list(numbers))})
        (folder.parent / name).mkdir()
        pq.write_table(table, folder.parent / name / "0.parquet")
    docs, asks = folder.parent / "docs", folder.parent / "asks"
    output = folder.parent / "found.trec"
    assert searched(docs, queries=asks, output=output) == {}
    best = [line.split()[:3] for line in output.read_text().splitlines() if line.split()[3] == "1"]
    assert best == [[f"q{n}", "Q0", f"p{n}"] for n in range(5)]
    measures = searched(docs, queries=asks, dataset=str(folder), split="dev")
    assert measures["mrr@10"] == pytest.approx(5 / 9)  # 4 judged queries have no vector
    with pytest.raises(UsageError, match="give --queries"):
        searched(docs)


def test_what_does_not_fit_together(folder: Path) -> None:
    passages, queries = encoded(folder, "passages"), encoded(folder, "queries", split="dev")
    with pytest.raises(UsageError, match="has vectors of queries"):
        searched(queries, queries=queries)
    table = pa.table({"docid": ["q1"], "vector": pa.array([[1.0, 2.0]])})
    pq.write_table(table, folder.parent / "small.parquet")
    with pytest.raises(UsageError, match=r"2 dimensions, but .* has 128"):
        searched(passages, queries=folder.parent / "small.parquet")
    (folder.parent / "there").touch()
    with pytest.raises(UsageError, match="exists already; --force"):
        searched(passages, queries=queries, output=folder.parent / "there")
    (folder.parent / "ranks").write_text("q1\tp1\t1\n")
    with pytest.raises(DataError, match="ranks without scores cannot be merged"):
        search(SearchConfig(sources=(folder.parent / "ranks",), merge=True))
