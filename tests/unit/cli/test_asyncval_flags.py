"""`mlflow-dr validate` and `evaluate` with Asyncval's flags."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from mlflow import MlflowClient

from mlflow_dr.cli.evaluate import evaluate_command
from mlflow_dr.cli.options import from_flags
from mlflow_dr.cli.validate import validate_command
from mlflow_dr.collection.asyncval import AsyncvalFiles
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.following import FollowedDirectory
from mlflow_dr.tracking.runs import TrackedRun, name_collection
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> Path:
    """Asyncval's inputs, with two sets of queries."""
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus/part.json", {f"p{number}": text for number, text in enumerate(texts)})
    write(tmp_path / "dev.query.json", {"q1": "who counts the ships"})
    write(tmp_path / "test.json", {"q2": "what do the gulls follow"})
    (tmp_path / "qrels.tsv").write_text("q1\t0\tp0\t1\nq2\t0\tp3\t1\n")
    return tmp_path


def write(path: Path, texts: dict[str, str]) -> None:
    records = [{"text_id": key, "text": text} for key, text in texts.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True)


def flags(files: Path, *queries: str) -> list[str]:
    return [
        *("--query_files", *(str(files / name) for name in queries)),
        *("--candidate_dir", str(files / "corpus"), "--qrel_file", str(files / "qrels.tsv")),
    ]


def called(command: click.Command, *argv: object) -> Any:
    return command.main([str(word) for word in argv], "mlflow-dr", standalone_mode=False)


def planned(argv: list[str]) -> ValidateConfig:
    """The configuration that `validate` makes of some flags."""
    with validate_command.make_context("validate", ["--run-id", "0", *argv]) as context:
        values = dict(context.params)
    return from_flags(ValidateConfig, values, values.pop("config"))


def test_a_command_line_of_asyncval_is_accepted(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    (files / "words").mkdir()
    plan = planned(
        [
            *flags(files, "dev.query.json"),
            *("--tokenizer_name_or_path", "words", "--q_max_len", "16", "--p_max_len", "64"),
            *("--depth", "100", "--metrics", "RR@10", "nDCG@10", "R@100", "AP@100"),
        ]
    )
    (validation,) = plan.all_validations
    name = AsyncvalFiles(files / "corpus", [files / "dev.query.json"], [files / "qrels.tsv"]).name
    assert (validation.name, validation.dataset, validation.split) == ("val", name, "dev.query")
    assert validation.settings.measures == parse_measures("mrr@10 ndcg@10 recall@100 map@100")
    assert validation.settings.depth == 100
    assert plan.encoder_changes == {
        "query_max_length": 16,
        "passage_max_length": 64,
        "tokenizer": str(files / "words"),
    }


@pytest.mark.parametrize(
    "spelt",
    [
        ["--query-file", "A", "--query-file", "B"],
        ["--query_file", "A", "--query_file", "B"],
        ["--query_files", "A", "B"],
        ["--query_files", "A", "--query-file", "B"],
    ],
)
def test_several_query_files_are_several_validations(files: Path, spelt: list[str]) -> None:
    names = {"A": str(files / "dev.query.json"), "B": str(files / "test.json")}
    argv = [names.get(word, word) for word in spelt]
    argv += ["--candidate-dir", str(files / "corpus"), "--qrel-file", str(files / "qrels.tsv")]
    plan = planned(argv)
    assert [(validation.name, validation.split) for validation in plan.all_validations] == [
        ("val-dev_query", "dev.query"),
        ("val-test", "test"),
    ]
    (chosen,) = planned([*argv, "--split", "test"]).all_validations
    assert (chosen.name, chosen.split) == ("val", "test")


@pytest.mark.parametrize("flags", [["--measures", "mrr@5 ap@7"], ["--metrics", "mrr@5", "AP@7"]])
def test_measures_may_be_one_argument_or_several(flags: list[str]) -> None:
    (validation,) = planned(flags).all_validations
    assert validation.settings.measures == parse_measures("mrr@5 map@7")


def test_query_files_and_a_configuration_file(files: Path) -> None:
    """A validation of the plan that names no collection has that of the flags."""
    (files / "plan.yaml").write_text(
        "validations: {short: {measures: mrr@5}, other: {dataset: demo, split: dev}}"
    )
    argv = [*flags(files, "dev.query.json", "test.json"), "--config", str(files / "plan.yaml")]
    plan = planned(argv)
    queries = [files / "dev.query.json", files / "test.json"]
    name = AsyncvalFiles(files / "corpus", queries, [files / "qrels.tsv"]).name
    assert [
        (validation.name, validation.dataset, validation.split)
        for validation in plan.all_validations
    ] == [
        ("short-dev_query", name, "dev.query"),
        ("short-test", name, "test"),
        ("other", "demo", "dev"),
    ]


def test_a_configuration_file_and_other_flags(tmp_path: Path) -> None:
    """Flags fill in what the file does not set; the file sets the names."""
    file = tmp_path / "plan.yaml"
    file.write_text("validations: {a: , b: {dataset: demo}}")
    argv = ["--config", str(file), "--subset", "random:5", "--seed", "2"]
    argv += ["--subset", "random:9", "--split", "dev", "--keep-up"]
    plan = planned(argv)
    assert plan.keep_up
    assert [(validation.name, validation.split) for validation in plan.all_validations] == [
        (f"{name}{subset}", "dev")
        for name in "ab"
        for subset in ("-random_5-seed_2", "-random_9-seed_2")
    ]
    with pytest.raises(UsageError, match="--name: the names of validations are in the file"):
        planned(["--config", str(file), "--name", "c"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidate_dir", "."], "there is no query_files, no qrel_files"),
        (["--dataset", "demo", "--candidate_dir", "."], "give dataset, or candidate_dir"),
    ],
)
def test_files_and_a_dataset_together_are_refused(flags: list[str], message: str) -> None:
    for command, given in ((validate_command, ["--run-id", "0"]), (evaluate_command, ["tiny"])):
        with pytest.raises(UsageError, match=message):
            called(command, *given, *flags)


def test_evaluate_needs_a_dataset_and_a_single_query_set(files: Path) -> None:
    with pytest.raises(UsageError, match="give --dataset, or --candidate-dir, --query-file"):
        called(evaluate_command, "tiny")
    argv = flags(files, "dev.query.json")
    argv += ["--query_files", str(files / "test.json")]
    with pytest.raises(UsageError, match=r"--split dev\.query or test"):
        called(evaluate_command, "tiny", *argv)


def test_evaluate(
    files: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(tmp_path / "encoder", encoder)
    output = tmp_path / "report.json"
    argv = [*flags(files, "test.json"), "--output", output, "--device", "cpu"]
    called(evaluate_command, tmp_path / "encoder", *argv, "--metrics", "RR@10", "nDCG@10")
    report = json.loads(output.read_text())
    assert list(report["queries"]) == ["q2"]
    assert list(report["measures"]) == ["mrr@10", "ndcg@10"]
    assert f"mrr@10\t{report['measures']['mrr@10']:.4f}" in capsys.readouterr().out


def test_an_encoder_after_an_option_is_not_taken_as_its_value() -> None:
    argv = ["--dataset", "demo", "--metrics", "RR@10", "encoder"]
    with evaluate_command.make_context("evaluate", argv) as context:
        assert (context.params["measures"], context.params["encoder"]) == (("RR@10",), "encoder")


def test_a_directory_of_checkpoints_is_validated_at_their_steps(
    client: MlflowClient,
    run: TrackedRun,
    files: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 6: the steps are those of the training, not the validator's count."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the command sets it
    for step in (500, 1000):
        save_encoder(files / f"output/checkpoint-{step}", encoder)
    argv = [*flags(files, "dev.query.json", "test.json"), "--metrics", "RR@10", "nDCG@10"]
    argv += ["--depth", "100", "--q_max_len", "16", "--tokenizer_name_or_path"]
    argv += [str(files / "output/checkpoint-500"), "--ckpts_dir", str(files / "output")]
    argv += ["--run-id", run.id, "--once", "--device", "cpu", "--dtype", "fp32"]
    assert called(validate_command, *argv, "--tracking-uri", client.tracking_uri) == 0
    for name in ("val-dev_query", "val-test"):
        points = client.get_metric_history(run.id, f"{name}/mrr_at_10")
        assert sorted(point.step for point in points) == [500, 1000]


def test_a_run_names_the_files_and_another_validator_opens_them(
    client: MlflowClient, run: TrackedRun, files: Path, encoder: Encoder
) -> None:
    far = files.joinpath(*["a-folder-with-a-name-that-is-long" * 4] * 2)
    far.mkdir(parents=True)
    queries = [path.rename(far / path.name) for path in sorted(files.glob("*.json"))]
    name = AsyncvalFiles(files / "corpus", queries, [files / "qrels.tsv"]).name
    assert len(name) > 500  # more than MLflow takes as a dataset's name
    name_collection(run, name, "test")
    save_encoder(files / "output/checkpoint-3", encoder)
    plan = ValidateConfig(measures="mrr@10", device="cpu", dtype="fp32", follow=False)
    counts = run_validator(FollowedDirectory(run, files / "output", is_mine=False), plan)
    assert (counts.done, counts.failed) == (1, 0)
    (point,) = client.get_metric_history(run.id, "val/mrr_at_10")
    assert point.step == 3
    (shown,) = run.fetch().inputs.dataset_inputs
    assert len(shown.dataset.name) == 500
    assert "dev.query.json" in shown.dataset.source
