"""The best checkpoint on the hub, and its card."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_endpoint import HubEndpoint

from mlflow_dr.cli.runs import best_command
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import HubError, UsageError
from mlflow_dr.report.contents import RunReport, read_report
from mlflow_dr.report.model_card import MARK
from mlflow_dr.report.pushing import check_repository, push
from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.fetching import local_directory
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name

REPO = "sea/retriever"
COMMAND = "mlflow-dr train --dataset /home/me/sea --tracking-uri https://me:secret@host"


@pytest.fixture
def report(run: TrackedRun, make_tiny: Callable[..., Any], tmp_path: Path) -> RunReport:
    """Two checkpoints, of which the second is better."""
    save_encoder(tmp_path / "encoder", make_tiny())
    bind_name(run, "val", {"measures": "mrr@10"})
    for step, ranks in ((0, [0.5, 0.0]), (5, [1.0, 0.5])):
        publish(run, tmp_path / "encoder", step)
        checkpoint = run_checkpoints(run)[-1]
        record_result(run, checkpoint, "val", {"mrr_at_10": sum(ranks) / 2}, ("sea", "0"))
        values = {f"q{n}": {"mrr@10": rank} for n, rank in enumerate(ranks)}
        log_per_query_values(run, checkpoint, "val", values)
    run.log_params({"model": "org/small-bert", "dataset": "mteb/scifact:test", "pooling": "mean"})
    run.set_tags({"mlflow_dr.command_line": COMMAND})
    run.log_collection("port", "7", "", {"passages": 600, "split": "dev"}, "validation val")
    run.fetch()
    return read_report(run)


def metadata(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_repository_has_the_encoder_its_card_and_its_curve(
    report: RunReport, hub_endpoint: HubEndpoint, tmp_path: Path
) -> None:
    checkpoint = report.best.checkpoint
    stored = local_directory(checkpoint.location)
    before = sorted(stored.rglob("*"))
    assert push(report, REPO, "apache-2.0") == f"{hub_endpoint.url}/{REPO}"
    files = hub_endpoint.files(REPO)
    for name, content in files.items():
        (tmp_path / "loaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loaded" / name).write_bytes(content)
    load_encoder(tmp_path / "loaded")
    assert {"README.md", "curve.png"} <= files.keys()
    assert not {"manifest.json", "MLmodel", "requirements.txt"} & files.keys()
    assert files["model.safetensors"] == (stored / "model.safetensors").read_bytes()
    assert files["curve.png"].startswith(b"\x89PNG")
    assert sorted(stored.rglob("*")) == before  # nothing is written into the store
    assert hub_endpoint.commits == [f"Step 5 of {report.run.name}"]
    assert not hub_endpoint.private


def test_the_card_has_figures_collection_command_and_licence(
    report: RunReport, hub_endpoint: HubEndpoint
) -> None:
    push(report, REPO, "apache-2.0")
    card = hub_endpoint.files(REPO)["README.md"].decode()
    about = metadata(card)
    assert about["license"] == "apache-2.0"
    assert about["base_model"] == "org/small-bert"
    assert about["datasets"] == ["mteb/scifact"]
    (model,) = about["model-index"]
    (result,) = model["results"]
    assert model["name"] == "retriever"
    assert [metric["value"] for metric in result["metrics"]] == [0.75]
    assert "| val | port (split dev, 600 passages) | mrr@10 | 0.7500 | 0.5000 to 1.0000 |" in card
    assert "![The curve of mrr@10 over the training](curve.png)" in card
    assert "mlflow-dr train --dataset /home/me/sea" in card
    assert "secret" not in card
    assert f'SentenceTransformer("{REPO}")' in card


def test_the_card_is_one_that_the_hub_reads(report: RunReport, hub_endpoint: HubEndpoint) -> None:
    from huggingface_hub import ModelCard

    push(report, REPO)
    data = ModelCard(hub_endpoint.files(REPO)["README.md"].decode()).data
    assert [result.metric_value for result in data.eval_results] == [0.75]
    assert data.license is None


def test_a_card_of_somebody_else_stays(report: RunReport, hub_endpoint: HubEndpoint) -> None:
    push(report, REPO)
    edited = hub_endpoint.files(REPO)["README.md"].decode().replace(MARK, "")
    hub_endpoint.put(REPO, {"README.md": edited})
    push(report, REPO, "mit")
    assert hub_endpoint.files(REPO)["README.md"].decode() == edited
    assert "model.safetensors" in hub_endpoint.files(REPO)


def test_a_token_without_write_access_is_one_clear_error(
    report: RunReport, hub_endpoint: HubEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_endpoint.token = "of the owner"
    with pytest.raises(HubError, match=r"does not let this user write to sea/retriever; set HF_TO"):
        push(report, REPO)
    monkeypatch.setenv("HF_TOKEN", "of the owner")
    push(report, REPO, private=True)
    assert hub_endpoint.private == [REPO]


@pytest.mark.parametrize(
    ("repo", "licence", "says"),
    [
        ("retriever", None, "expected OWNER/NAME"),
        ("sea/retriever/x", None, "expected OWNER/NAME"),
        (REPO, "All rights reserved", "expected an identifier of the hub"),
    ],
)
def test_what_the_hub_would_refuse(repo: str, licence: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_repository(repo, licence)


def test_best_pushes(
    report: RunReport, hub_endpoint: HubEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--run-id", report.run.id, "--push", REPO]
    best_command.main(argv, "mlflow-dr", standalone_mode=False)
    shown = capsys.readouterr()
    assert f"  pushed      {hub_endpoint.url}/{REPO}\n" in shown.out
    assert "the card names no licence; pass --license" in shown.err
