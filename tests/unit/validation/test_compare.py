"""Comparisons of checkpoints and encoders, over a real store."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from mlflow_dr.cli.evaluate import compare_command
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.decisions.comparison import Comparison, comparison_text
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import DataError, TrackingError, UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation import evaluate as evaluating
from mlflow_dr.validation.compare import compare, find_operands
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.evaluate_config import CompareConfig
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.resolve import EvalDatasets
from mlflow_dr.validation.validations import EvalConfig, Validation

MEASURES = "mrr@10 ndcg@5"
SETTINGS = EvalConfig(parse_measures(MEASURES), device="cpu", dtype="fp32")
Validate = Callable[..., str]


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {f"q{number}": " ".join(text.split()[2:5]) for number, text in enumerate(texts)},
        dev={f"q{number}": {f"p{number}": 1} for number in range(7)},
        test={f"q{number}": {f"p{number}": 1} for number in range(7, 10)},
    )


@pytest.fixture
def encoders(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Callable[[int], Path]:
    """The directory of an encoder, other weights for each number."""

    def directory(seed: int) -> Path:
        path = tmp_path / f"encoder-{seed}"
        if not path.exists():
            save_encoder(path, make_tiny(seed=seed, pooling="mean", normalize=True))
        return path

    return directory


def report(directory: Path, folder: Path, split: str = "dev") -> Report:
    prepared = EvalDataset(BeirFolder(folder), split)
    return evaluate(load_encoder(directory), prepared, SETTINGS, quiet=True)


@pytest.fixture
def validated(run: TrackedRun, encoders: Callable[[int], Path], folder: Path) -> Validate:
    """Publishes encoder n as the checkpoint of step n, validated as a validator does it.

    Keywords: whether values of single queries are kept, the validation's name and split, and the
    run. Returns the model id.
    """

    def validated(
        step: int, keep: bool = True, name: str = "val", split: str = "dev", to: TrackedRun = run
    ) -> str:
        bound = EvalDatasets().resolve(to, Validation(SETTINGS, name, str(folder), split), {})
        model_id = publish(to, encoders(step), step)
        checkpoint = next(
            candidate for candidate in run_checkpoints(to) if candidate.model_id == model_id
        )
        found = report(encoders(step), folder, split)
        values = {key.replace("@", "_at_"): value for key, value in found.measures.items()}
        record_result(to, checkpoint, name, values, bound.shown_dataset)
        if keep:
            log_per_query_values(to, checkpoint, name, found.per_query)
        return model_id

    return validated


@pytest.fixture
def other_run(client: MlflowClient, experiment: str) -> TrackedRun:
    return TrackedRun(client, client.create_run(experiment, run_name=f"run-{uuid4()}"))


def compared(*operands: object, **others: Any) -> Comparison:
    return compare(CompareConfig(operands=tuple(map(str, operands)), device="cpu", **others))


def test_each_kind_of_operand(
    run: TrackedRun,
    other_run: TrackedRun,
    validated: Validate,
    encoders: Callable[[int], Path],
    folder: Path,
) -> None:
    first = validated(1)
    by_id = validated(2)
    validated(3, to=other_run)
    validated(4, to=other_run)
    values = {step: report(encoders(step), folder) for step in (1, 2, 3, 4, 5)}
    best = max((3, 4), key=lambda step: (values[step].measures["mrr@10"], -step))
    operands = (f"{run.id}@1", other_run.id, f"models:/{by_id}", encoders(5))
    found = compared(*operands, dataset=str(folder))
    for row, step in zip(found.values, (1, best, 2, 5), strict=True):
        expected = [query_values["mrr@10"] for query_values in values[step].per_query.values()]
        assert row.tolist() == pytest.approx(expected)
    assert found.labels == (
        f"{run.name} step 1, models:/{first}",
        f"{other_run.name} step {best}, models:/{run_checkpoints(other_run)[best - 3].model_id}",
        f"{run.name} step 2, models:/{by_id}",
        str(encoders(5)),
    )
    assert len(found.differences) == 3
    assert found.query_ids == [f"q{number}" for number in range(7)]
    assert list(found.means) == ["mrr@10", "ndcg@5"]
    assert found.means["ndcg@5"] == pytest.approx(
        [values[step].measures["ndcg@5"] for step in (1, best, 2, 5)]
    )


def test_stored_values_are_not_measured_again(
    run: TrackedRun, validated: Validate, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated(1)
    validated(2)
    monkeypatch.setattr(evaluating, "evaluate", lambda *_: pytest.fail("evaluated"))
    found = compared(f"{run.id}@1", f"{run.id}@2", measure="ndcg@5", seed=3)
    assert found.measure == "ndcg@5"
    again = compared(f"{run.id}@1", f"{run.id}@2", measure="ndcg@5", seed=3, dataset=str(folder))
    assert again.differences == found.differences


def test_a_checkpoint_without_values_is_evaluated_as_the_validation_says(
    run: TrackedRun, validated: Validate, folder: Path, encoders: Callable[[int], Path]
) -> None:
    validated(1)
    validated(2, keep=False)
    operands = (f"{run.id}@1", f"{run.id}@2")
    message = rf"run {run.id} has no values of single queries for step 2 .*; give --dataset to eval"
    with pytest.raises(UsageError, match=message):
        compared(*operands)
    found = compared(*operands, dataset=str(folder))
    expected = report(encoders(2), folder).per_query
    assert found.values[1].tolist() == [values["mrr@10"] for values in expected.values()]


def test_the_split_of_the_validation_is_evaluated(
    run: TrackedRun, validated: Validate, folder: Path, encoders: Callable[[int], Path]
) -> None:
    validated(1, name="test", split="test")
    found = compared(run.id, encoders(2), name="test", dataset=str(folder))
    assert found.query_ids == ["q7", "q8", "q9"]


def test_two_encoders_need_no_server(
    encoders: Callable[[int], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = compared(encoders(1), encoders(2), dataset=str(folder), split="test", measure="mrr@3")
    assert (found.measure, list(found.means)) == ("mrr@3", ["mrr@3"])
    assert found.query_ids == ["q7", "q8", "q9"]


def test_an_encoder_needs_a_dataset(run: TrackedRun, encoders: Callable[[int], Path]) -> None:
    name = re.escape(str(encoders(1)))
    with pytest.raises(UsageError, match=rf"'{name}' is not a run id, RUN@STEP .* give --dataset"):
        compared(encoders(1), encoders(1))


def test_queries_are_shown_when_the_collection_is_available(
    run: TrackedRun, validated: Validate, folder: Path
) -> None:
    validated(1)
    validated(2)
    operands = (f"{run.id}@1", f"{run.id}@2")
    texts = {query.id: query.text for query in BeirFolder(folder).topics("dev").queries}
    assert compared(*operands).texts == texts
    moved = folder.rename(folder.with_name("moved"))
    assert compared(*operands).texts == {}
    assert compared(*operands, dataset=str(moved)).texts == texts
    moved.rename(folder)
    (folder / "qrels" / "dev.tsv").write_text("q1\tp1\t1\n")
    assert compared(*operands).texts == {}
    (folder / "qrels" / "dev.tsv").write_text("q1\tp1\n")
    assert compared(*operands).texts == {}


def test_checkpoints_on_different_collections_cannot_be_compared(
    run: TrackedRun, other_run: TrackedRun, validated: Validate, folder: Path
) -> None:
    validated(1)
    validated(2, split="test", to=other_run)
    message = r"do not compare: of .* step 1, .* topics is '.*', not '.*' as of .* step 2"
    with pytest.raises(UsageError, match=message):
        compared(run.id, other_run.id)
    with pytest.raises(UsageError, match=rf"do not compare: .* of {re.escape(str(folder))}/test"):
        compared(run.id, run.id, dataset=str(folder), split="test")


def test_queries_that_are_missing_are_counted(run: TrackedRun, validated: Validate) -> None:
    validated(1)
    validated(2)
    second = run_checkpoints(run)[1]
    log_per_query_values(run, second, "val", {"q1": {"mrr@10": 1.0, "ndcg@5": 1.0}})
    with pytest.raises(DataError, match="6 of 7 are missing from the latter, and 0 of 1 from"):
        compared(f"{run.id}@1", f"{run.id}@2")


def test_a_step_that_was_not_published(run: TrackedRun, validated: Validate) -> None:
    with pytest.raises(UsageError, match=r"no published checkpoint of step 7; it has none at all"):
        find_operands([f"{run.id}@7"], "val", None, run.client.tracking_uri)
    for step in (1, 2):
        validated(step, keep=False)
    with pytest.raises(UsageError, match=r"step 7; the nearest steps are 1, 2$"):
        compared(f"{run.id}@7", run.id)


def test_an_unknown_validation_is_refused(run: TrackedRun, validated: Validate) -> None:
    validated(1)
    with pytest.raises(UsageError, match=rf"run {run.id} has no validation 'nq' to choose"):
        compared(run.id, f"{run.id}@1", name="nq")
    with pytest.raises(UsageError, match="has no metric 'val/recall_at_3'"):
        compared(run.id, run.id, measure="recall@3")
    with pytest.raises(DataError, match=r"has no values of recall@3; it has: mrr@10, ndcg@5"):
        compared(f"{run.id}@1", f"{run.id}@1", measure="recall@3")


def test_an_unknown_run_or_checkpoint_is_refused(run: TrackedRun, validated: Validate) -> None:
    validated(1)
    with pytest.raises(TrackingError, match=f"no run '{'0' * 32}'"):
        compared(run.id, "0" * 32)
    with pytest.raises(TrackingError, match="model m-0: "):
        compared(run.id, "models:/m-0")


def test_an_unreachable_server_is_one_clear_error() -> None:
    before = mlflow.get_tracking_uri()
    with pytest.raises(TrackingError, match=r"tracking server http://127\.0\.0\.1:9 does not answ"):
        compared("0" * 32, "1" * 32, tracking_uri="http://127.0.0.1:9")
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"measure": "ndgc@10"}, UsageError, "measure 'ndgc@10': expected one of"),
        ({"measure": "mrr@10 ndcg@5"}, UsageError, "expected one measure, not 2"),
        ({"dtype": "fp8", "dataset": "demo"}, UsageError, "dtype 'fp8'"),
        ({"output": Path(__file__)}, UsageError, "expected a folder, not a file"),
    ],
)
def test_a_wrong_flag_is_refused_before_any_work(
    others: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compared("nowhere/a", "nowhere/b", **others)


def test_stored_values_need_no_torch() -> None:
    code = "import sys, mlflow_dr.validation.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_command_prints_and_writes(
    run: TrackedRun, validated: Validate, tmp_path: Path, client: MlflowClient
) -> None:
    validated(1)
    validated(2)
    operands = [f"{run.id}@1", f"{run.id}@2"]
    argv = [*operands, "--tracking-uri", client.tracking_uri, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(compare_command, [*argv, "--changed", "3"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output == comparison_text(compared(*operands), 3) + "\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"values.csv", "differences.png"}
    with pytest.raises(UsageError, match="1 encoders to compare; expected 2 to 26"):
        CliRunner().invoke(compare_command, argv[1:], catch_exceptions=False)


def test_the_only_validation_name_is_the_default() -> None:
    assert CompareConfig(operands=("a", "b")).name == Validation(SETTINGS).name


def test_different_lengths_are_reported_and_can_be_set(
    run: TrackedRun,
    validated: Validate,
    encoders: Callable[[int], Path],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run at 24 tokens, and an encoder with its own length."""
    validated(1)
    run.log_params({"p_max_len": 24})
    argv, data = (f"{run.id}@1", str(encoders(2))), {"dataset": str(folder), "device": "cpu"}
    with caplog.at_level("WARNING", "mlflow_dr"):
        compare(CompareConfig(operands=argv, p_max_len=24, **data))
        assert "of other lengths" not in caplog.text
        compare(CompareConfig(operands=argv, p_max_len=12, **data))
    assert "read passages of other lengths in tokens (A 24, B 12)" in caplog.text


def test_a_run_may_be_named(run: TrackedRun, validated: Validate) -> None:
    validated(1), validated(2)
    by_name = compare(CompareConfig(operands=(f"{run.id}@1", f"{run.name}@2")))
    assert (
        by_name.labels
        == compare(CompareConfig(operands=(f"{run.id}@1", f"{run.id[:12]}@2"))).labels
    )


def test_earlier_output_is_not_overwritten(
    run: TrackedRun, validated: Validate, tmp_path: Path
) -> None:
    validated(1), validated(2)
    asked = CompareConfig(operands=(f"{run.id}@1", f"{run.id}@2"), output=tmp_path / "out")
    compare(asked)
    with pytest.raises(UsageError, match=r"values\.csv: exists already; --force replaces it"):
        compare(asked)
    compare(asked.replaced(force=True))
