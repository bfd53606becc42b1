"""`mlflow.models.evaluate` with published checkpoints, against an evaluation without MLflow."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.models import EvaluationResult

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.checkpoints import publish
from mlflow_dr.tracking.datasets import CollectionDataset
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.evaluator import DenseRetrievalEvaluator
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig

MEASURES = "mrr@10 ndcg@5 recall@3"


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {f"q{number}": " ".join(text.split()[2:5]) for number, text in enumerate(texts)},
        dev={f"q{number}": {f"p{number}": 1} for number in range(6)},
        test={f"q{number}": {f"p{number}": 1} for number in range(6, 10)},
    )


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True, query_prompt="find ", passage_max_length=24)


@pytest.fixture
def expected(encoder: Encoder, folder: Path) -> Report:
    settings = EvalConfig(parse_measures(MEASURES), device="cpu", dtype="fp32")
    return evaluate(encoder, EvalDataset(BeirFolder(folder), "dev"), settings, quiet=True)


@pytest.fixture
def model_id(run: TrackedRun, encoder: Encoder, tmp_path: Path) -> str:
    save_encoder(tmp_path / "encoder", encoder)
    return publish(run, tmp_path / "encoder", 7)


@pytest.fixture
def data(folder: Path) -> CollectionDataset:
    return mlflow.data.from_dense_retrieval(str(folder), split="dev")


@pytest.fixture
def active(experiment: str, client: MlflowClient) -> Iterator[str]:
    with mlflow.start_run(experiment_id=experiment) as run:
        yield run.info.run_id


def measured(model: Any, data: Any, **config: Any) -> EvaluationResult:
    config = {"measures": MEASURES, "dtype": "fp32", "device": "cpu", **config}
    return mlflow.models.evaluate(
        model,
        data,
        model_type="dense_retriever",
        evaluators="dense_retrieval",
        evaluator_config=config,
    )


def figures(report: Report, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{k.replace('@', '_at_')}": value for k, value in report.measures.items()}


def test_the_figures_equal_an_evaluation_without_mlflow(
    model_id: str, data: CollectionDataset, expected: Report, active: str, client: MlflowClient
) -> None:
    result = measured(f"models:/{model_id}", data)
    assert result.metrics == pytest.approx(figures(expected))
    assert client.get_run(active).data.metrics == pytest.approx(figures(expected))
    of_model = {metric.key: metric for metric in client.get_logged_model(model_id).metrics}
    assert {key: metric.value for key, metric in of_model.items()} == pytest.approx(
        figures(expected)
    )
    assert of_model["mrr_at_10"].dataset_digest == data.digest
    history = client.get_metric_history(active, "mrr_at_10")
    assert len(history) == 1


def test_the_collection_is_an_input_of_the_run(
    model_id: str, data: CollectionDataset, active: str, client: MlflowClient
) -> None:
    measured(f"models:/{model_id}", data)
    (entry,) = client.get_run(active).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == (data.name, data.digest)
    assert mlflow.data.get_source(entry).split == "dev"


def test_a_table_has_every_query(
    model_id: str, data: CollectionDataset, expected: Report, active: str, tmp_path: Path
) -> None:
    result = measured(f"models:/{model_id}", data)
    path = mlflow.artifacts.download_artifacts(
        run_id=active, artifact_path="eval_results_table.json"
    )
    table = pd.read_json(path, orient="split")
    assert list(table.columns) == ["query_id", "query", "mrr_at_10", "ndcg_at_5", "recall_at_3"]
    found = dict(zip(table["query_id"], table["mrr_at_10"], strict=True))
    assert found == pytest.approx({q: values["mrr@10"] for q, values in expected.per_query.items()})
    result.save(tmp_path / "kept")
    again = EvaluationResult.load(tmp_path / "kept")
    content = again.artifacts["eval_results_table"].content
    assert content["columns"] == list(table.columns)
    assert [row[:2] for row in content["data"]] == table.iloc[:, :2].to_numpy().tolist()
    assert [row[2] for row in content["data"]] == pytest.approx(table["mrr_at_10"].tolist())


def test_a_prefix_is_put_before_all_names(
    model_id: str, data: CollectionDataset, expected: Report, active: str, client: MlflowClient
) -> None:
    result = measured(f"models:/{model_id}", data, metric_prefix="sea/", log_ranking=True, depth=12)
    assert result.metrics == pytest.approx(figures(expected, "sea/"))
    files = {file.path for file in client.list_artifacts(active, "sea")}
    assert files == {"sea/eval_results_table.json", "sea/ranking.trec"}
    lines = result.artifacts["ranking"].content.splitlines()
    assert len(lines) == 6 * 10  # the corpus has no more
    assert lines[0].split()[:2] == ["q0", "Q0"]
    path = mlflow.artifacts.download_artifacts(run_id=active, artifact_path="sea/ranking.trec")
    assert Path(path).read_text() == result.artifacts["ranking"].content


def test_ids_that_no_ranking_holds_are_refused_before_anything_is_logged(
    model_id: str, beir_folder: Callable[..., Path], active: str, client: MlflowClient
) -> None:
    judged = {"q1": {"p 1": 1}}
    folder = beir_folder({"p 1": "a tug"}, {"q1": "which ship"}, "spaced", dev=judged)
    data = mlflow.data.from_dense_retrieval(str(folder), split="dev")
    with pytest.raises(DataError, match="cannot hold white space in ids"):
        measured(f"models:/{model_id}", data, log_ranking=True)
    assert client.get_run(active).data.metrics == {}
    assert measured(f"models:/{model_id}", data).metrics["mrr_at_10"] == 1


def test_a_loaded_model_is_measured_and_left_as_it_was(
    model_id: str, data: CollectionDataset, active: str, client: MlflowClient
) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    before = model.predict(["salt water"])
    result = measured(model, data, dtype="bf16")
    assert np.array_equal(model.predict(["salt water"]), before)
    # such a model has no id, so nothing but the evaluator logs its figures
    assert client.get_run(active).data.metrics == result.metrics
    assert len(client.get_metric_history(active, "mrr_at_10")) == 1


def test_the_collection_may_be_named_in_the_configuration(
    model_id: str, folder: Path, active: str, client: MlflowClient, expected: Report
) -> None:
    anything = pd.DataFrame({"text": ["not looked at"]})
    result = measured(f"models:/{model_id}", anything, dataset=str(folder), split="dev")
    assert result.metrics == pytest.approx(figures(expected))
    inputs = {
        dataset_input.dataset.name: dataset_input.dataset
        for dataset_input in client.get_run(active).inputs.dataset_inputs
    }
    assert inputs[str(folder)].source_type == "mlflow_dr"


def test_our_evaluator_is_the_default(model_id: str, data: CollectionDataset, active: str) -> None:
    result = mlflow.models.evaluate(f"models:/{model_id}", data, model_type="dense_retriever")
    assert set(result.metrics) == {"mrr_at_10", "ndcg_at_10", "recall_at_100"}


def test_evaluations_of_other_models_are_left_alone() -> None:
    for kind in ("classifier", "regressor", "retriever", "text", None):
        can = DenseRetrievalEvaluator.can_evaluate(model_type=kind, evaluator_config={})
        assert not can, kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mesures": "mrr@10"}, "no key .mesures.; did you mean .measures."),
        ({"depth": "10"}, "depth is '10'; expected a whole number"),
        ({"depth": 5}, "depth 5 is too shallow for mrr@10"),
        ({"measures": "mrr"}, "measure 'mrr': expected one of"),
        ({"dataset": "demo"}, "/dev already; leave dataset and split out"),
    ],
)
def test_a_wrong_configuration_is_refused(
    config: dict[str, Any], message: str, model_id: str, data: CollectionDataset, active: str
) -> None:
    with pytest.raises(UsageError, match=message):
        measured(f"models:/{model_id}", data, **config)


def test_data_that_is_not_a_collection_is_refused(model_id: str, active: str) -> None:
    with pytest.raises(UsageError, match=r"give data=mlflow\.data\.from_dense_retrieval"):
        measured(f"models:/{model_id}", pd.DataFrame({"text": ["a"]}))


def test_a_model_of_another_kind_is_refused(data: CollectionDataset, active: str) -> None:
    with pytest.raises(UsageError, match="expected a checkpoint that mlflow_dr has published"):
        measured(lambda frame: frame, data)


def test_extra_metrics_are_refused(data: CollectionDataset) -> None:
    with pytest.raises(UsageError, match="takes no extra_metrics"):
        DenseRetrievalEvaluator().evaluate(
            model_type="dense_retriever",
            dataset=data.to_evaluation_dataset(),
            run_id="",
            evaluator_config={},
            model=SimpleNamespace(),
            extra_metrics=[object()],
        )
