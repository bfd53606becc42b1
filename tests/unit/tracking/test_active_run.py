from collections.abc import Iterator

import mlflow
import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun, active_run_id, name_collection


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    yield


def test_a_run_comes_from_the_argument_the_active_run_or_the_environment(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "from-variable")
    assert active_run_id() == "from-variable"
    monkeypatch.delenv(RUN_VARIABLE)  # start_run would take it up
    with mlflow.start_run(run_id=run.id):
        monkeypatch.setenv(RUN_VARIABLE, "from-variable")
        assert active_run_id() == run.id
        assert active_run_id("asked") == "asked"


def test_a_missing_run_is_an_error_that_names_the_options() -> None:
    with pytest.raises(UsageError, match=r"mlflow.start_run.*report_to.*MLFLOW_RUN_ID.*run_id"):
        active_run_id()


def test_the_run_has_what_a_validator_needs(run: TrackedRun) -> None:
    name_collection(run, "/data/scifact", "dev")
    name_collection(run, "/data/scifact", "dev")
    data = run.fetch().data
    assert data.tags["mlflow_dr.dataset"] == "/data/scifact"
    assert data.params == {"dataset": "/data/scifact", "validation_split": "dev"}


def test_a_split_that_the_run_does_not_have_is_refused(run: TrackedRun) -> None:
    run.log_params({"validation_split": "test"})
    with pytest.raises(UsageError, match="already has validation_split='test'") as caught:
        name_collection(run, "demo", "dev")
    assert "--split dev" in str(caught.value)
