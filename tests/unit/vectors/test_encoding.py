"""Encoding a collection into files of vectors, and checking them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.vectors import open_vectors
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.tracking.checkpoints import publish
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.vectors import encoding
from mlflow_dr.vectors.config import EncodeConfig
from mlflow_dr.vectors.encoding import encode, encoder_digest, missing_vectors


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    corpus = {f"p{n}": " ".join(texts[: n % 5 + 1]) + f" {n}" for n in range(40)}
    queries = {f"q{n}": text for n, text in enumerate(texts)}
    return beir_folder(corpus, queries, dev={q: {"p1": 1} for q in queries})


@pytest.fixture
def encoder(make_untied_encoder: Callable[..., Encoder], tmp_path: Path) -> Encoder:
    made = make_untied_encoder()
    save_encoder(tmp_path / "encoder", made)
    return made


def asked(folder: Path, **others: Any) -> EncodeConfig:
    values = {"dtype": "fp32", "output": folder.parent / "vectors", "tokens_per_batch": 60}
    return EncodeConfig(
        **{
            "encoder": str(folder.parent / "encoder"),
            "dataset": str(folder),
            "device": "cpu",
            **values,
            **others,
        }
    )


def test_passages_and_queries_have_the_vectors_of_their_encoders(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    encode(asked(folder))
    encode(asked(folder, split="dev", output=tmp_path / "queries"))
    collection = open_collection(str(folder))
    for output, part, kind in (
        ("vectors", encoder, "passages"),
        ("queries", encoder.query_encoder, "queries"),
    ):
        tokenizer = TextTokenizer.of(part)
        ids = (
            tokenizer.passage_ids(collection.corpus().passages(range(40)))
            if kind == "passages"
            else tokenizer.query_ids(collection.topics("dev").queries)
        )
        expected = encode_all(part, token_table(ids), tokenizer.pad_id).numpy()
        opened = open_vectors(tmp_path / output)
        np.testing.assert_allclose(opened.read(), expected, atol=1e-6)
        assert opened.manifest is not None
        assert (opened.manifest.kind, opened.manifest.similarity) == (kind, "cosine")
        assert opened.manifest.encoder_digest == encoder_digest(encoder)
    assert open_vectors(tmp_path / "queries").ids.to_pylist() == [f"q{n}" for n in range(10)]


@pytest.mark.parametrize("shards", [2, 7])
def test_shards_have_the_bits_of_the_whole(
    folder: Path, encoder: Encoder, tmp_path: Path, shards: int
) -> None:
    encode(asked(folder))
    for shard in reversed(range(shards)):
        encode(asked(folder, output=tmp_path / "shards", shard=f"{shard}/{shards}"))
    whole, parts = open_vectors(tmp_path / "vectors"), open_vectors(tmp_path / "shards")
    order = np.argsort([int(name[1:]) for name in parts.ids.to_pylist()])
    np.testing.assert_array_equal(parts.read()[order], whole.read())
    assert missing_vectors(tmp_path / "shards") == []


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_other_libraries_read_the_files_as_they_are(
    folder: Path, encoder: Encoder, tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    encode(asked(folder, shard=f"all/{shards}"))
    vectors = open_vectors(tmp_path / "vectors")
    rows = datasets.load_dataset(str(tmp_path / "vectors"), split="train").with_format("numpy")
    assert rows["docid"][:].tolist() == vectors.ids.to_pylist()
    np.testing.assert_array_equal(rows["vector"][:], vectors.read())
    for file in (tmp_path / "vectors").glob("*.parquet"):  # as Anserini names the parts
        with pq.ParquetFile(file) as opened:
            paths = [opened.schema.column(number).path for number in range(2)]
        assert paths == ["docid", "vector.list.element"]


def test_all_shards_by_one_command(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    for split in (None, "dev"):
        for shard in range(5):
            encode(asked(folder, output=tmp_path / f"one{split}", shard=f"{shard}/5", split=split))
        output = tmp_path / f"all{split}"
        manifests = encode(asked(folder, output=output, shard="all/5", split=split))
        assert [manifest.shard for manifest in manifests] == list(range(5))
        for path in (tmp_path / f"one{split}").iterdir():
            assert (output / path.name).read_bytes() == path.read_bytes()


def test_several_devices_write_the_same_shards_however_many_they_are(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    manifests = encode(asked(folder, device="cpu,cpu"))
    assert {manifest.shards for manifest in manifests} == {64}
    assert sum(manifest.rows for manifest in manifests) == 40
    assert missing_vectors(tmp_path / "vectors") == []
    encode(asked(folder, output=tmp_path / "one"))
    whole, parts = open_vectors(tmp_path / "one"), open_vectors(tmp_path / "vectors")
    order = np.argsort([int(name[1:]) for name in parts.ids.to_pylist()])
    np.testing.assert_array_equal(parts.read()[order], whole.read())


def test_half_precision_is_stored_and_computed_in_fp32_on_a_processor(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    encode(asked(folder))
    (manifest,) = encode(asked(folder, output=tmp_path / "half", dtype="fp16"))
    assert (manifest.dtype, manifest.vector_dtype) == ("fp32", "fp16")
    whole = open_vectors(tmp_path / "vectors").read()
    half = open_vectors(tmp_path / "half").read()
    np.testing.assert_array_equal(half, whole.astype(np.float16).astype(np.float32))


def test_nothing_is_encoded_twice(
    folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(asked(folder))
    monkeypatch.setattr(encoding, "encode_to_host", lambda *_: pytest.fail("encoded"))
    assert encode(asked(folder)) == first


def test_what_is_missing_or_damaged_is_said(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    output = tmp_path / "vectors"
    with pytest.raises(UsageError, match="no such folder"):
        missing_vectors(output)
    for shard in (0, 2, 3):
        encode(asked(folder, shard=f"{shard}/5"))
    assert missing_vectors(output) == ["--shard 1/5 is missing", "--shard 4/5 is missing"]
    (file,) = output.glob("*00002-of-00005*.parquet")
    content = file.read_bytes()
    file.write_bytes(content[:60] + b"XY" + content[62:])
    (output / ".encode-00004-of-00005").mkdir()
    assert missing_vectors(output) == [
        "encode-00004-of-00005 is not finished; run the same command again",
        f"{file.name} has other bytes than were written (SHA-256 differs); encode with --shard 2/5",
        *("--shard 1/5 is missing", "--shard 4/5 is missing"),
    ]
    (output / ".encode-00004-of-00005").rmdir()
    for shard in (1, 2, 4):
        encode(asked(folder, shard=f"{shard}/5"))
    assert missing_vectors(output) == []


def test_the_digest_of_an_encoder_is_of_weights_and_pooling(
    make_tiny: Callable[..., Encoder],
) -> None:
    same = [{}, {}, {"query_prompt": "find "}, {"passage_max_length": 64}]
    others = [{"seed": 1}, {"pooling": "mean"}, {"normalize": True}]
    (first, *rest), different = (
        [encoder_digest(make_tiny(**settings)) for settings in some] for some in (same, others)
    )
    assert set(rest) == {first}
    assert len({first, *different}) == 4


def test_the_manifest_is_stored_with_the_checkpoints_run(
    folder: Path, encoder: Encoder, run: TrackedRun, tmp_path: Path
) -> None:
    model = publish(run, tmp_path / "encoder", 30)
    uri = f"models:/{model}"
    (manifest,) = encode(asked(folder, encoder=uri, log=True))
    (entry,) = run.client.list_artifacts(run.id, "vectors")
    assert entry.path == f"vectors/step-00000030-{model}"
    (file,) = run.client.list_artifacts(run.id, entry.path)
    text = Path(run.client.download_artifacts(run.id, file.path, str(tmp_path))).read_text()
    assert manifest.encoder_digest in text
    assert manifest.files[0].sha256 in text


def test_an_unknown_split_or_collection(folder: Path, encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="has no split 'tset'"):
        encode(asked(folder, split="tset"))
    with pytest.raises(UsageError, match="give --dataset"):
        encode(asked(folder, dataset=None))
