"""`mlflow-dr doctor`: what it finds, and that it leaves nothing behind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from mlflow_dr.cli.machine import doctor_command
from mlflow_dr.doctor import examine, machine, services
from mlflow_dr.doctor.finding import Finding, caught
from mlflow_dr.errors import MlflowDrError
from mlflow_dr.tracking import access


@pytest.fixture(autouse=True)
def _tracking_is_reset(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    yield
    mlflow.set_tracking_uri(before)


def found(check: Callable[..., Any], *arguments: object) -> list[Finding]:
    return list(caught("checked", lambda: check(*arguments)))


def test_a_machine_without_faults_and_nothing_is_left_behind(
    client: MlflowClient,
    experiment: str,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    findings = list(examine.examine(client.tracking_uri))
    assert not [finding for finding in findings if finding.level == "fail"]
    names = [finding.name for finding in findings]
    for name in ("Python", "processor", "FAISS", "cache", "tracking", "rights", "artifacts", "hub"):
        assert name in names
    about = client.get_experiment(experiment)
    assert access.PROBE_TAG not in about.tags
    assert not list(Path(about.artifact_location).glob(f"{access.PROBE_FOLDER}*"))
    assert not list(own_cache.iterdir())


def test_the_exit_code_says_whether_something_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, code in (("warn", 0), ("fail", 1)):
        monkeypatch.setattr(examine, "examine", lambda uri, level=level: [Finding("a", level, "b")])
        assert doctor_command.main([], "mlflow-dr", standalone_mode=False) == code
    monkeypatch.setattr(examine, "examine", lambda uri: [Finding("disk", "fail", "1 GB free")])
    shown = CliRunner().invoke(doctor_command, []).output
    assert shown == "fail  disk             1 GB free\n1 of these would fail\n"


def test_a_check_that_raises_is_a_finding() -> None:
    def fails() -> Any:
        raise RuntimeError("out of luck")

    assert found(fails) == [Finding("checked", "fail", "RuntimeError: out of luck")]


def test_a_server_that_is_away_fails_at_once() -> None:
    start = time.monotonic()
    (finding,) = found(services.check_tracking, "http://127.0.0.1:9")
    assert finding.level == "fail"
    assert "does not answer" in finding.text
    assert time.monotonic() - start < 10


def test_a_store_that_is_missing_can_be_made(tmp_path: Path) -> None:
    (finding,) = found(services.check_tracking, f"sqlite:///{tmp_path}/mlflow.db")
    assert (finding.level, list(tmp_path.iterdir())) == ("ok", [])


def test_what_gives_no_answer_is_not_waited_for() -> None:
    with pytest.raises(MlflowDrError, match=r"the hub gave no answer within 0 s"):
        services._within("the hub", lambda: time.sleep(5), 0.01)


def test_an_artifact_that_could_not_be_deleted_is_not_written(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def delete_artifacts(self, folder: str) -> None:
            raise PermissionError("no")

    monkeypatch.setattr(access, "get_artifact_repository", lambda location: Refusing())
    assert "permission MANAGE" in access.try_artifacts(client.get_experiment(experiment))


def test_a_server_that_names_a_directory(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "tracking_uri", lambda: "http://elsewhere")
    assert "--artifacts-destination" in access.try_artifacts(client.get_experiment(experiment))


@pytest.mark.parametrize(("version", "is_old"), [("2.9.1", True), ("3.13.0rc1", False)])
def test_old_servers(version: str, is_old: bool) -> None:
    assert access.is_too_old(version) == is_old


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = found(machine.check_cache)
    assert finding.level == "fail"
    assert "set MLFLOW_DR_CACHE to another folder" in finding.text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5 << 30, "total": 1 << 40})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert {finding.level for finding in found(machine.check_disks)} == {"warn"}
    usage.free = 1 << 20
    assert {finding.level for finding in found(machine.check_disks)} == {"fail"}


def test_a_device_that_multiplies_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.TOLERANCES, "bf16", 1e-9)
    (finding,) = found(machine.check_devices)
    assert "cpu multiplies bf16 wrongly" in finding.text


def test_two_builds_of_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_installed", lambda name: name in ("faiss-cpu", "faiss-gpu"))
    (finding,) = found(machine.check_faiss)
    assert "faiss-cpu and faiss-gpu share one import name" in finding.text


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (finding,) = found(services.check_hub)
    assert finding.level == "warn"
    assert "set HF_HUB_OFFLINE=1" in finding.text
