"""Studies: real processes, few documents."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from mlflow_dr.errors import ChildError, UsageError
from mlflow_dr.files import cache_dir
from mlflow_dr.loaders.cell import Workload
from mlflow_dr.loaders.config import LoadersConfig
from mlflow_dr.loaders.study import _measure_all, _prepare, logged_study, study_loaders
from mlflow_dr.tracking.client import tracking_uri


@pytest.fixture
def config(own_cache: Path, beir_folder: Callable[..., Path]) -> LoadersConfig:
    """Two stores, each measured once for ten batches of ten documents."""
    folder = beir_folder(
        {f"p{n}": ("title", f"gulls eat {n} fish") for n in range(30)},
        {"q": "what do gulls eat"},
        test={"q": {"p1": 1}},
    )
    return LoadersConfig(
        dataset=str(folder),
        store=("memory", "lookup"),
        payload="lookup",
        samples=100,
        seconds=600.0,
        batch_size=10,
        repeats=1,
        tracking_uri=tracking_uri(),
    )


def test_a_study_has_a_run_and_each_cell_a_child(
    client: MlflowClient, experiment: str, config: LoadersConfig
) -> None:
    name = client.get_experiment(experiment).name
    study = logged_study(config.replaced(experiment_name=name, run_name="stores"))
    assert [measured["samples"] for measured in study.cells] == [90, 90]  # after the first batch
    assert not list((cache_dir() / "loaders").iterdir())
    run = client.search_runs([experiment], "attributes.run_name = 'stores'")[0]
    assert run.info.status == "FINISHED"
    assert not [name for name in run.data.metrics if name.startswith("loaders/")]  # no curve
    assert len(study.measured) == 2
    names = {file.path for file in client.list_artifacts(run.info.run_id, "loaders")}
    assert {"loaders/report.txt", "loaders/table.csv", "loaders/where_time_goes.png"} <= names
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert {child.info.run_name for child in children} == {"memory", "lookup"}
    assert {child.info.status for child in children} == {"FINISHED"}
    assert all(child.data.metrics["loaders/samples_per_s"] > 0 for child in children)
    assert children[0].data.params["payload"] == "lookup"


def test_what_is_measured_is_not_measured_again(
    config: LoadersConfig, workload: Workload, tmp_path: Path
) -> None:
    (tmp_path / "0.0.json").write_text('{"samples": 7}')
    lookup = config.replaced(store=("memory", "lookup"), samples=400)
    workloads = {"lookup": replace(workload, seconds=600.0)}
    measured = _measure_all(lookup, workloads, "", tmp_path)
    assert [cell["samples"] for cell in measured] == [7, 392]


def test_no_file_of_a_store_stays_mapped_while_cells_are_measured(
    config: LoadersConfig, own_cache: Path
) -> None:
    with ExitStack() as ending:
        _prepare(config.replaced(store=("corpus", "lookup", "tokens")), ending)
    maps = Path("/proc/self/maps").read_text()
    assert not [kind for kind in ("corpora", "stores", "tokens") if f"{own_cache}/{kind}/" in maps]


def test_a_cell_that_cannot_be_measured_is_passed_over(
    config: LoadersConfig, workload: Workload, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Workload(directory=str(tmp_path / "missing"), rows=workload.rows)
    twice = config.replaced(store="lookup", repeats=2)
    with caplog.at_level(logging.WARNING):
        measured = _measure_all(twice, {"lookup": missing}, "", tmp_path)
    assert "no directory of the document store 'lookup'" in measured[0].problem
    assert not measured[0].repeats
    assert len(caplog.records) == 1


def test_a_study_without_figures_is_an_error(
    config: LoadersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "missing")  # no Python starts
    with pytest.raises(ChildError, match="no cell could be measured"):
        study_loaders(config)


def test_two_studies_at_a_time_are_refused(config: LoadersConfig, own_cache: Path) -> None:
    with FileLock(own_cache / "loaders.lock"), pytest.raises(UsageError, match="another loader"):
        study_loaders(config)
