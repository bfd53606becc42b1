"""The function for Ray Train's `ValidationConfig`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.ray import validation_fn
from mlflow_dr.validation.evaluate import evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig

SEA = Path(__file__).parents[2] / "examples/sea"


@pytest.fixture
def train() -> Any:
    """Ray Train; not imported where no test of it runs."""
    return pytest.importorskip("ray.train")


@pytest.fixture
def directory(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", make_tiny(pooling="mean"))
    return tmp_path / "encoder"


def test_ray_train_gets_what_evaluate_measures(directory: Path, train: Any) -> None:
    settings: dict[str, Any] = {"dataset": str(SEA), "measures": "mrr@10 ndcg@10", "device": "cpu"}
    config = train.ValidationConfig(
        fn=validation_fn, task_config=train.ValidationTaskConfig(fn_kwargs=settings)
    )
    checkpoint = train.Checkpoint.from_directory(str(directory))
    values = config.fn(checkpoint, **config.task_config.fn_kwargs)
    report = evaluate_encoder(EvaluateConfig(encoder=str(directory), **settings))
    assert values.pop("seconds") > 0
    assert values == {measure.metric: value for measure, value in report.measures.items()}
    assert sorted(values) == ["mrr_at_10", "ndcg_at_10"]


def test_a_setting_that_does_not_exist_is_refused(directory: Path, train: Any) -> None:
    checkpoint = train.Checkpoint.from_directory(str(directory))
    with pytest.raises(UsageError, match="no key 'datset'"):
        validation_fn(checkpoint, datset="demo")
