"""Published checkpoints as MLflow's `python_function`, against sentence-transformers."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import Model
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from mlflow_dr import pyfunc
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.tracking.checkpoints import checkpoint_by_id, prepare_upload, publish
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.publish_api import publish_checkpoint

TEXTS = ["gulls and trawlers", "The tide is in the harbour at noon.", "otter"]


@pytest.fixture
def encoder(make_untied_encoder: Callable[..., Encoder]) -> Encoder:
    """Queries and passages differ in prompt, length and weights."""
    return make_untied_encoder(query_prompt="find the ", passage_prompt="tell of ")


@pytest.fixture
def directory(encoder: Encoder, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", encoder)
    prepare_upload(tmp_path / "encoder")
    return tmp_path / "encoder"


def peers_vectors(directory: Path, texts: Sequence[str], kind: str) -> np.ndarray:
    peer = SentenceTransformer(str(directory), device="cpu")
    encode = peer.encode_query if kind == "query" else peer.encode_document
    return np.asarray(encode(list(texts)))


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_a_published_checkpoint_gives_the_vectors_that_sentence_transformers_gives(
    kind: str, run: TrackedRun, directory: Path
) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{publish(run, directory, 3)}")
    got = model.predict(TEXTS, params={"prompt": kind})
    assert (got.dtype, got.shape) == (np.float32, (3, 24))
    np.testing.assert_allclose(got, peers_vectors(directory, TEXTS, kind), rtol=0, atol=1e-5)


def test_texts_are_queries_by_default(directory: Path) -> None:
    model = mlflow.pyfunc.load_model(str(directory))
    queries = model.predict(TEXTS, params={"prompt": "query"})
    assert np.array_equal(model.predict(TEXTS), queries)
    assert not np.allclose(model.predict(TEXTS, params={"prompt": "passage"}), queries, atol=0.01)


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        np.array(TEXTS),
        pd.Series(TEXTS),
        pd.DataFrame({"anything": TEXTS}),
        pd.DataFrame({"text": TEXTS}, index=[7, 3, 5]),
    ],
    ids=["list", "array", "series", "frame", "index"],
)
def test_texts_come_in_any_form(given: object, directory: Path) -> None:
    model = mlflow.pyfunc.load_model(str(directory))
    np.testing.assert_allclose(model.predict(given), model.predict(TEXTS), rtol=0, atol=1e-6)


def test_no_texts_give_no_vectors(directory: Path) -> None:
    model = mlflow.pyfunc.load_model(str(directory))
    assert model.predict(pd.DataFrame({"text": []}, dtype=object)).shape == (0, 24)
    assert model.predict("gulls").shape == (1, 24)


def test_values_that_are_not_text_are_refused(directory: Path) -> None:
    model = mlflow.pyfunc.load_model(str(directory))
    with pytest.raises(UsageError, match="text 1 is nan; expected a string in each row"):
        model.predict(["gulls", None])  # which is nan by the time that MLflow calls
    with pytest.raises(UsageError, match="prompt 'document': expected 'query' or 'passage'"):
        model.predict(TEXTS, params={"prompt": "document"})


def test_simultaneous_requests_keep_their_own_lengths(
    make_tiny: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    # token counts instead of vectors, which would take most of the time
    monkeypatch.setattr(pyfunc, "encode_all", lambda _, table, *others: torch.tensor(table.lengths))
    model = pyfunc.TextsToVectors(make_tiny(query_max_length=16))
    kinds = ["query", "passage"] * 1000
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(lambda kind: model.predict(["x " * 200], {"prompt": kind}), kinds)
            )
    finally:
        sys.setswitchinterval(before)
    assert [int(vector[0]) for vector in found] == [16, 128] * 1000


def test_several_threads_get_the_vectors_of_one(make_tiny: Callable[..., Encoder]) -> None:
    model = pyfunc.TextsToVectors(make_tiny(pooling="mean"))
    expected = model.predict(TEXTS)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: model.predict(TEXTS), range(40)):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.predict(TEXTS), expected)


def test_mlflow_reads_the_inputs_and_outputs_of_the_model(directory: Path) -> None:
    signature = Model.load(str(directory)).signature
    assert signature.inputs == Schema([ColSpec("string")])
    assert signature.outputs == Schema([TensorSpec(np.dtype("float32"), (-1, 24))])
    assert signature.params == ParamSchema([ParamSpec("prompt", "string", "query")])


def test_the_model_lists_its_requirements_for_mlflow(directory: Path) -> None:
    requirements = Path(mlflow.pyfunc.get_model_dependencies(str(directory))).read_text()
    assert requirements.startswith("mlflow_dr==")
    assert f"\ntorch=={torch.__version__.partition('+')[0]}\n" in requirements
    conda = Path(mlflow.pyfunc.get_model_dependencies(str(directory), format="conda"))
    assert "mlflow_dr==" in conda.read_text()


def test_the_same_encoder_has_the_same_files(encoder: Encoder, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        save_encoder(tmp_path / name, encoder)
        digests.append(prepare_upload(tmp_path / name))
    assert digests[0] == digests[1]
    assert prepare_upload(tmp_path / "two") == digests[0]


def test_nothing_is_pickled(directory: Path) -> None:
    kinds = {path.suffix for path in directory.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".yaml", ""}
    assert {path.name for path in directory.rglob("*") if not path.suffix} >= {"MLmodel"}
    text = (directory / "MLmodel").read_text()
    assert "loader_module: mlflow_dr.pyfunc" in text
    assert "pickle" not in text


def test_the_directory_loads_as_before(directory: Path, encoder: Encoder) -> None:
    state = load_encoder(directory).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert AutoModel.from_pretrained(directory, add_pooling_layer=False) is not None


def test_the_description_is_verified_like_every_file(run: TrackedRun, directory: Path) -> None:
    checkpoint = checkpoint_by_id(run.client, publish(run, directory, 1))
    with checkpoint_files(checkpoint) as path:
        (path / "MLmodel").write_text("loader_module: os")
    with (
        pytest.raises(CheckpointError, match="MLmodel has"),
        checkpoint_files(checkpoint, with_mlmodel=True),
    ):
        pass


def test_checkpoints_of_other_trainers_load_too(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    save_encoder(tmp_path / "start", make_tiny(pooling="cls", query_prompt="ask "))
    (tmp_path / "start" / "mlflow_dr.json").unlink()
    theirs = SentenceTransformer(str(tmp_path / "start"), device="cpu")
    model_id = publish_checkpoint(theirs, 5, run_id=run.id)
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 128)
    expected = theirs.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(model.predict(TEXTS), expected, rtol=0, atol=1e-5)


def test_a_damaged_checkpoint_is_refused_in_one_line(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        mlflow.pyfunc.load_model(str(directory))


def test_only_what_the_manifest_lists_is_used(directory: Path) -> None:
    before = mlflow.pyfunc.load_model(str(directory)).predict(TEXTS)
    (directory / "special_tokens_map.json").write_text('{"cls_token": "the"}')
    (directory / "query" / "added").mkdir()
    after = mlflow.pyfunc.load_model(str(directory)).predict(TEXTS)
    np.testing.assert_array_equal(before, after)
