import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_dr.decisions.best import best_summary, find_best
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.reader.config import ReaderPredictConfig, ReaderValidateConfig
from mlflow_dr.reader.model import ReaderSource, save_reader
from mlflow_dr.reader.prediction import predict_answers
from mlflow_dr.reader.validation import validate_reader
from mlflow_dr.tracking.artifacts import per_query_values, stored_query_texts
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.fetching import download
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import stop_request
from mlflow_dr.validation.compare import compare
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.evaluate_config import CompareConfig
from mlflow_dr.validation.validator import run_validator

SEA = Path(__file__).parents[3] / "examples" / "sea"


def never(seconds: float) -> None:
    raise AssertionError("nothing is left to wait for")


@pytest.fixture
def config(
    write_results: Callable[..., Path], run: TrackedRun, client: MlflowClient
) -> ReaderValidateConfig:
    return ReaderValidateConfig(
        run_id=run.id,
        results=write_results(),
        eval_top_docs=(1, 5),
        sequence_length=64,
        device="cpu",
        dtype="fp32",
        tracking_uri=client.tracking_uri,
    )


def test_each_checkpoint_of_a_run_is_measured_once(
    config: ReaderValidateConfig,
    make_reader: Callable[[], Any],
    tokenizer: Any,
    run: TrackedRun,
    tmp_path: Path,
) -> None:
    reader = make_reader()
    for step in (2, 4):
        directory = tmp_path / f"step-{step}"
        ReaderSource(reader, tokenizer).save(directory, reader.state_dict())
        publish(run, directory, step)
    (tmp_path / "broken").mkdir()
    save_reader(tmp_path / "broken", reader, tokenizer)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    publish(run, tmp_path / "broken", 5)
    run.finish("FINISHED")
    counts = validate_reader(config, never)
    assert (counts.done, counts.failed) == (2, 1)
    counts = validate_reader(config, never)
    assert (counts.done, counts.failed, counts.passed_over) == (0, 0, 1)
    first = run_checkpoints(run)[0]
    assert first.step == 2
    download(first, tmp_path / "again")
    alone = ReaderPredictConfig(
        reader=first.uri,
        **{name: getattr(config, name) for name in ("results", "eval_top_docs", "device", "dtype")},
        sequence_length=64,
    )
    metrics = run.fetch().data.metrics
    for name, value in predict_answers(alone).items():
        assert metrics[f"reader/{name.replace('@', '_at_')}"] == value
    history = run.client.get_metric_history(run.id, "reader/em_at_5")
    assert sorted(point.step for point in history) == [2, 4]
    assert find_best(run).checkpoint.step == 2
    assert str(find_best(run, "reader/f1@5").metric) == "reader/f1_at_5"
    texts = {record["question"] for record in json.loads(config.results.read_text())}
    assert set(stored_query_texts(run, first, "reader").values()) == texts
    flavors = (tmp_path / "again" / "MLmodel").read_text()
    assert "mlflow_dr_reader" in flavors and "python_function" not in flavors


def test_a_name_stands_for_one_configuration(
    config: ReaderValidateConfig, run: TrackedRun, write_results: Callable[..., Path]
) -> None:
    run.finish("FINISHED")
    assert validate_reader(config, never).done == 0
    others = write_results(json.loads(config.results.read_text())[:1], "others.json")
    with pytest.raises(UsageError, match="--name"):
        validate_reader(config.replaced(results=others), never)
    assert validate_reader(config.replaced(results=others, name="other"), never).done == 0
    with pytest.raises(UsageError, match="only 3 passages are read"):
        validate_reader(config.replaced(passages_per_question=3), never)
    with pytest.raises(DataError, match="cannot be read"):
        validate_reader(config.replaced(results=others.with_name("missing.json")), never)


def test_once_ends_while_the_run_goes_on(config: ReaderValidateConfig) -> None:
    assert validate_reader(config.replaced(follow=False), never).nothing


def test_reader_validation_has_the_rules_of_validators(
    config: ReaderValidateConfig,
    make_reader: Callable[[], Any],
    tokenizer: Any,
    run: TrackedRun,
    tmp_path: Path,
) -> None:
    reader = make_reader()
    ReaderSource(reader, tokenizer).save(tmp_path / "reader", reader.state_dict())
    for step in (1, 2, 3, 4, 6):
        publish(run, tmp_path / "reader", step)
    rules = config.replaced(every=2, order="newest", patience=2, follow=False, name="every 2")
    assert validate_reader(rules, never).done == 3
    history = run.client.get_metric_history(run.id, "every 2/em_at_1")
    assert sorted(point.step for point in history) == [2, 4, 6]
    assert stop_request(run) is not None  # equal readers do not improve
    best = find_best(run)
    values = per_query_values(run, best.checkpoint, "every 2")
    assert list(values) == ["0", "1"]
    mean = sum(row["f1@5"] for row in values.values()) / 2
    assert mean == run.fetch().data.metrics["every 2/f1_at_5"]
    assert "over 2 queries" in best_summary(run, best)
    operands = (f"{run.id}@2", f"{run.id}@4")
    uri = run.client.tracking_uri
    asked = CompareConfig(operands=operands, name="every 2", measure="f1@5", tracking_uri=uri)
    assert compare(asked).measure == "f1@5"
    encoders = ValidateConfig(dataset=str(SEA), follow=False)
    others = run_validator(FollowedRun(run), encoders, never)
    assert "no checkpoint is a dense_retriever" in others.nothing
    with pytest.raises(UsageError, match="reader-validate"):
        compare(asked.replaced(operands=(f"{run.id}@2", f"{run.id}@3")))
