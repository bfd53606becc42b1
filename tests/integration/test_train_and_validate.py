"""Training that publishes and a validator that follows, over the HTTP server."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

Call = Callable[..., subprocess.CompletedProcess]
STEPS = [0, 5, 10, 15, 20]
METRICS = {
    *("mrr_at_10", "ndcg_at_10", "recall_at_100"),
    *("seconds", "passages_per_second", "lag_seconds"),
}


def test_trainer_and_validator_end_well(followed: SimpleNamespace) -> None:
    assert followed.training.returncode == 0, followed.training.stderr
    assert followed.validator_code == 0, followed.validator_printed
    assert followed.validator_printed.startswith(f"waiting until run {followed.run_id} has")
    assert (
        f"validated 5 checkpoints of run {followed.run_id}; 0 failed" in followed.validator_printed
    )


def test_every_checkpoint_has_one_point_for_each_metric(
    followed: SimpleNamespace,
    points: Callable,
    client: MlflowClient,
) -> None:
    found = points(client, followed.run_id, "val")
    assert found.keys() == METRICS
    for metric, by_step in found.items():
        assert sorted(by_step) == STEPS, metric
        assert all(len(values) == 1 for values in by_step.values()), metric
    for (mrr,), (recall,) in zip(
        found["mrr_at_10"].values(), found["recall_at_100"].values(), strict=True
    ):
        assert 0 < mrr < recall <= 1
    assert all(0 < lag < 600 for (lag,) in found["lag_seconds"].values())


def test_points_name_the_collection_they_were_measured_on(
    followed: SimpleNamespace, client: MlflowClient, checkpoints: Callable, collection: Path
) -> None:
    inputs = client.get_run(followed.run_id).inputs.dataset_inputs
    by_context = {dataset_input.tags[0].value: dataset_input.dataset for dataset_input in inputs}
    assert by_context.keys() == {"training", "validation val"}
    assert json.loads(by_context["training"].profile) == {"examples": 240, "split": "train"}
    validated = by_context["validation val"]
    assert validated.name == str(collection)
    sizes = {"passages": 300, "queries": 60, "judgements": 60}
    assert json.loads(validated.profile) == {**sizes, "split": "dev"}
    for model in checkpoints(client, followed.run_id).values():
        for metric in client.get_logged_model(model.model_id).metrics:
            assert (metric.dataset_name, metric.dataset_digest) == (
                validated.name,
                validated.digest,
            )


def test_the_run_records_how_it_was_trained(
    followed: SimpleNamespace, client: MlflowClient, collection: Path
) -> None:
    run = client.get_run(followed.run_id)
    assert run.info.status == "FINISHED"
    expected = {
        "dataset": str(collection),
        "validation_split": "dev",
        "model": "tiny",
        "learning_rate": "0.002",
        "max_steps": "20",
        "publish_steps": "5",
        "per_device_train_batch_size": "16",
        "p_max_len": "48",
    }
    assert expected.items() <= run.data.params.items()
    assert run.data.tags["mlflow_dr.command"] == "train"
    assert {"mlflow_dr.version", "mlflow_dr.torch", "mlflow_dr.host"} <= run.data.tags.keys()
    losses = client.get_metric_history(followed.run_id, "train/loss")
    assert [point.step for point in losses] == list(range(2, 21, 2))
    assert losses[-1].value < losses[0].value


def test_checkpoints_are_ready_and_outputs_of_the_run(
    followed: SimpleNamespace, client: MlflowClient, checkpoints: Callable
) -> None:
    models = checkpoints(client, followed.run_id)
    assert list(models) == STEPS
    assert {model.status for model in models.values()} == {LoggedModelStatus.READY}
    outputs = client.get_run(followed.run_id).outputs.model_outputs
    assert {(output.step, output.model_id) for output in outputs} == {
        (step, model.model_id) for step, model in models.items()
    }


def test_a_published_checkpoint_loads_with_sentence_transformers(
    followed: SimpleNamespace,
    checkpoints: Callable,
    artifact_store: Path,
    client: MlflowClient,
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    from mlflow_dr.collection.records import Query
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.tokenize import TextTokenizer
    from mlflow_dr.retrieval.encode import encode_all
    from mlflow_dr.stores.token_table import token_table

    directory = _stored(artifact_store, checkpoints(client, followed.run_id)[20].model_id)
    texts = ["Return the number of items.", "Open a file and read its first line"]
    encoder = load_encoder(directory, safetensors_only=True)
    text_tokenizer = TextTokenizer.of(encoder)
    queries = [Query(str(number), text) for number, text in enumerate(texts)]
    ours = encode_all(
        encoder, token_table(text_tokenizer.query_ids(queries)), text_tokenizer.pad_id
    )
    theirs = SentenceTransformer(str(directory), device="cpu").to(torch.float32).encode(texts)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def _stored(artifact_store: Path, model_id: str) -> Path:
    (directory,) = artifact_store.glob(f"*/models/{model_id}/artifacts")
    return directory


def test_validating_again_adds_nothing(
    followed: SimpleNamespace,
    call: Call,
    server: str,
    points: Callable,
    client: MlflowClient,
) -> None:
    before = points(client, followed.run_id, "val")
    done = call("mlflow-dr", "validate", "--run-id", followed.run_id, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    assert f"validated 0 checkpoints of run {followed.run_id}; 0 failed" in done.stderr
    assert points(client, followed.run_id, "val") == before


def test_a_name_keeps_its_configuration(
    followed: SimpleNamespace,
    call: Call,
    server: str,
    points: Callable,
    client: MlflowClient,
) -> None:
    before = points(client, followed.run_id, "val")
    argv = ["mlflow-dr", "validate", "--run-id", followed.run_id, "--measures", "mrr@5"]
    done = call(*argv, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: validation 'val' of run {followed.run_id} has another")
    assert "measures is 'mrr@10 ndcg@10 recall@100', not 'mrr@5'" in line
    assert line.endswith("choose another --name")
    assert points(client, followed.run_id, "val") == before


def test_evaluating_a_checkpoint_gives_the_measures_of_its_validation(
    followed: SimpleNamespace,
    call: Call,
    server: str,
    collection: Path,
    points: Callable,
    checkpoints: Callable,
    tmp_path: Path,
    client: MlflowClient,
) -> None:
    name = f"models:/{checkpoints(client, followed.run_id)[15].model_id}"
    report = tmp_path / "report.json"
    argv = ["mlflow-dr", "evaluate", name, "--dataset", collection, "--output", report]
    done = call(*argv, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    validated = points(client, followed.run_id, "val")
    for measure, value in json.loads(report.read_text())["measures"].items():
        assert [value] == validated[measure.replace("@", "_at_")][15]


def test_damaged_and_foreign_models_do_not_stop_the_others(
    publish_noise: Callable[..., str],
    client: MlflowClient,
    checkpoints: Callable,
    points: Callable,
    artifact_store: Path,
    call: Call,
    server: str,
) -> None:
    run_id = publish_noise(0, 7, 14, 21)
    models = checkpoints(client, run_id)
    flipped = _stored(artifact_store, models[7].model_id) / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    truncated = _stored(artifact_store, models[14].model_id) / "model.safetensors"
    size = truncated.stat().st_size
    truncated.write_bytes(truncated.read_bytes()[: size // 2])
    stray = client.create_logged_model("0", name="another", source_run_id=run_id)
    client.finalize_logged_model(stray.model_id, LoggedModelStatus.READY)

    done = call("mlflow-dr", "validate", "--run-id", run_id, MLFLOW_TRACKING_URI=server)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"validated 2 checkpoints of run {run_id}; 2 failed" in done.stderr
    reasons = {
        step: model.tags["mlflow_dr.validation.val.failed"]
        for step, model in checkpoints(client, run_id).items()
        if "mlflow_dr.validation.val.failed" in model.tags
    }
    assert reasons == {
        7: "model.safetensors has other bytes than were published (SHA-256 differs)",
        14: f"model.safetensors has {size // 2} bytes, but {size} were published",
    }
    for step, reason in reasons.items():
        assert f"error: step {step} cannot be validated: {reason}" in done.stderr
    assert {
        metric: sorted(by_step) for metric, by_step in points(client, run_id, "val").items()
    } == ({metric: [0, 21] for metric in METRICS})
