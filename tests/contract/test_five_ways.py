"""A published checkpoint loads in five ways, which give the same vectors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id, prepare_upload, publish
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.runs import TrackedRun

TEXTS = ["gulls and trawlers", "The tide is in the harbour at noon.", "otter"]
TOLERANCE = 1e-6


@pytest.fixture
def client(empty_store: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    before = mlflow.get_tracking_uri()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    yield connect(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(before)


@pytest.fixture
def publish_encoder(client: MlflowClient, tmp_path: Path) -> Callable[[Encoder], Checkpoint]:
    def publish_it(encoder: Encoder) -> Checkpoint:
        save_encoder(tmp_path / "encoder", encoder)
        experiment = client.create_experiment("published", str(tmp_path / "artifacts"))
        run = TrackedRun(client, client.create_run(experiment))
        return checkpoint_by_id(client, publish(run, tmp_path / "encoder", 7))

    return publish_it


def by_auto_model(directory: Path) -> np.ndarray:
    """Mean pooling and normalisation by hand."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(means).numpy()


def by_mlflow_dr(checkpoint: Checkpoint) -> np.ndarray:
    with checkpoint_files(checkpoint) as directory:
        encoder = load_encoder(directory, safetensors_only=True)
    text_tokenizer = TextTokenizer.of(encoder)
    ids = text_tokenizer.passage_ids([Passage("", "", text) for text in TEXTS])
    return encode_all(encoder, token_table(ids), text_tokenizer.pad_id, "passage").numpy()


def check_five_ways(checkpoint: Checkpoint) -> None:
    loaded = mlflow.sentence_transformers.load_model(checkpoint.uri)
    library = SentenceTransformer(checkpoint.location, device="cpu")
    pyfunc = mlflow.pyfunc.load_model(checkpoint.uri)
    expected = library.encode_document(TEXTS)
    ways = {
        "mlflow.sentence_transformers": loaded.encode_document(TEXTS),
        "pyfunc": pyfunc.predict(TEXTS, params={"prompt": "passage"}),
        "AutoModel": by_auto_model(Path(checkpoint.location)),
        "mlflow_dr": by_mlflow_dr(checkpoint),
    }
    for way, vectors in ways.items():
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE, err_msg=way)
    assert [type(module) for module in loaded] == [type(module) for module in library]
    assert loaded.prompts == library.prompts


def test_a_tiny_checkpoint(
    make_tiny: Callable[..., Encoder], publish_encoder: Callable[[Encoder], Checkpoint]
) -> None:
    check_five_ways(publish_encoder(make_tiny(pooling="mean", normalize=True)))


def test_minilm(minilm: Path, publish_encoder: Callable[[Encoder], Checkpoint]) -> None:
    check_five_ways(publish_encoder(load_encoder(minilm)))


def test_separate_query_weights(
    make_untied_encoder: Callable[..., Encoder], publish_encoder: Callable[[Encoder], Checkpoint]
) -> None:
    """Queries and passages differ in prompt, length, weights and a projection."""
    encoder = make_untied_encoder(query_prompt="find the ", passage_prompt="tell of ")
    checkpoint = publish_encoder(encoder)
    loaded = mlflow.sentence_transformers.load_model(checkpoint.uri)
    pyfunc = mlflow.pyfunc.load_model(checkpoint.uri)
    for kind, encode in (("query", loaded.encode_query), ("passage", loaded.encode_document)):
        vectors = pyfunc.predict(TEXTS, params={"prompt": kind})
        np.testing.assert_allclose(encode(TEXTS), vectors, rtol=0, atol=TOLERANCE)
    assert not np.allclose(loaded.encode_query(TEXTS), loaded.encode_document(TEXTS), atol=0.01)


def test_a_model_that_mlflow_loaded_is_saved_as_usual(
    make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    save_encoder(tmp_path / "encoder", make_tiny())
    prepare_upload(tmp_path / "encoder")
    mlflow.sentence_transformers.load_model(str(tmp_path / "encoder")).save(str(tmp_path / "copy"))
    modules = json.loads((tmp_path / "copy" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_a_directory_of_other_modules_has_no_such_flavour(tmp_path: Path) -> None:
    for name, text in {
        "bare": None,
        "custom": '[{"idx": 0, "name": "0", "path": "", "type": "custom.Module"}]',
        "damaged": '[{"idx": 0',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if text is not None:
            (tmp_path / name / "modules.json").write_text(text)
        prepare_upload(tmp_path / name)
        assert "sentence_transformers:" not in (tmp_path / name / "MLmodel").read_text()
        assert not (tmp_path / name / "model.sentence_transformer").exists()
