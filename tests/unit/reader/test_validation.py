import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_dr.decisions.best import find_best
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.reader.config import ReaderPredictConfig, ReaderValidateConfig
from mlflow_dr.reader.model import ReaderSource, save_reader
from mlflow_dr.reader.prediction import predict_answers
from mlflow_dr.reader.validation import ReaderCounts, validate_reader
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.fetching import download
from mlflow_dr.tracking.runs import TrackedRun


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
    assert validate_reader(config, never) == ReaderCounts(done=2, failed=1)
    assert validate_reader(config, never) == ReaderCounts(done=0, failed=0)
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
    flavors = (tmp_path / "again" / "MLmodel").read_text()
    assert "mlflow_dr_reader" in flavors and "python_function" not in flavors


def test_a_name_stands_for_one_configuration(
    config: ReaderValidateConfig, run: TrackedRun, write_results: Callable[..., Path]
) -> None:
    run.finish("FINISHED")
    assert validate_reader(config, never) == ReaderCounts(0, 0)
    others = write_results(json.loads(config.results.read_text())[:1], "others.json")
    with pytest.raises(UsageError, match="--name"):
        validate_reader(config.replaced(results=others), never)
    assert validate_reader(config.replaced(results=others, name="other"), never).done == 0
    with pytest.raises(UsageError, match="only 3 passages are read"):
        validate_reader(config.replaced(passages_per_question=3), never)
    with pytest.raises(DataError, match="cannot be read"):
        validate_reader(config.replaced(results=others.with_name("missing.json")), never)


def test_once_ends_while_the_run_goes_on(config: ReaderValidateConfig) -> None:
    assert validate_reader(config.replaced(follow=False), never) == ReaderCounts(0, 0)
