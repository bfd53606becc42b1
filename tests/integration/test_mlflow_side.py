"""A published checkpoint in other people's hands: loaded and served by MLflow alone."""

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.checkpoints import checkpoint_by_id
from mlflow_dr.tracking.fetching import checkpoint_files

QUERIES = ["Return a shallow copy of a list.", "How are two dates compared?"]
PASSAGES = [
    "Return a new list that has the items of the old one; the items are not copied.",
    "Two dates are compared by year, then by month, then by day. " * 20,
]


@pytest.fixture(scope="module")
def model_id(publish_noise: Callable[..., str], client: MlflowClient) -> str:
    run_id = publish_noise(4)
    (model,) = client.search_logged_models(["0"], filter_string=f"source_run_id = '{run_id}'")
    return str(model.model_id)


@pytest.fixture(scope="module")
def on_server(server: str) -> Iterator[None]:
    """MLflow in this process is set to the server."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def expected(model_id: str, client: MlflowClient, on_server: None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors as a validation makes them, of queries and of passages."""
    from mlflow_dr.collection.records import Passage, Query
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.tokenize import TextTokenizer
    from mlflow_dr.retrieval.encode import encode_all
    from mlflow_dr.stores.token_table import token_table

    with checkpoint_files(checkpoint_by_id(client, model_id)) as directory:
        encoder = load_encoder(directory)
    text_tokenizer = TextTokenizer.of(encoder)
    queries = text_tokenizer.query_ids([Query("", text) for text in QUERIES])
    passages = text_tokenizer.passage_ids([Passage("", "", text) for text in PASSAGES])
    assert max(map(len, passages)) == encoder.settings.passage_max_length
    encoded = [
        encode_all(encoder, token_table(ids), text_tokenizer.pad_id) for ids in (queries, passages)
    ]
    return encoded[0].numpy(), encoded[1].numpy()


@pytest.fixture(scope="module")
def served(
    server: str,
    model_id: str,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    wait_until_healthy: Callable[..., None],
) -> Iterator[str]:
    """The address of `mlflow models serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = tmp_path_factory.mktemp("served")
    argv = ["mlflow", "models", "serve", "-m", f"models:/{model_id}", "--env-manager", "local"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [*argv, "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory,
            env={**environment, "MLFLOW_TRACKING_URI": server},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, directory / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(address: str, payload: object) -> np.ndarray:
    request = urllib.request.Request(
        f"{address}/invocations",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return np.array(json.loads(answer.read())["predictions"], np.float32)


def test_a_served_checkpoint_answers_with_the_vectors_that_are_validated(
    served: str, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    queries, passages = expected
    np.testing.assert_allclose(post(served, {"inputs": QUERIES}), queries, rtol=0, atol=1e-5)
    of_passages = {"params": {"prompt": "passage"}}
    rows = {"dataframe_split": {"columns": ["text"], "data": [[text] for text in PASSAGES]}}
    for payload in ({"inputs": PASSAGES}, rows):
        got = post(served, payload | of_passages)
        np.testing.assert_allclose(got, passages, rtol=0, atol=1e-5)


def test_a_checkpoint_is_loaded_from_a_server(
    on_server: None, model_id: str, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{model_id}", dst_path=str(tmp_path))
    np.testing.assert_allclose(model.predict(QUERIES), expected[0], rtol=0, atol=1e-5)
    assert (tmp_path / "MLmodel").is_file()


def test_a_checkpoint_is_evaluated_on_a_server(
    on_server: None, model_id: str, collection: Path, client: MlflowClient
) -> None:
    dataset = mlflow.data.from_dense_retrieval(str(collection), split="dev")
    with mlflow.start_run(experiment_id="0") as run:
        result = mlflow.models.evaluate(
            f"models:/{model_id}",
            dataset,
            model_type="dense_retriever",
            evaluators="dense_retrieval",
            evaluator_config={"measures": "mrr@10", "metric_prefix": "dev/"},
        )
    seen = client.get_run(run.info.run_id)
    assert seen.data.metrics == result.metrics
    assert set(result.metrics) == {"dev/mrr_at_10"}
    (entry,) = seen.inputs.dataset_inputs
    assert mlflow.data.get_source(entry).collection == str(collection)
    (file,) = client.list_artifacts(run.info.run_id, "dev")
    assert file.path == "dev/eval_results_table.json"
