"""Studies of tiny encoders over a small collection and a real store."""

import csv
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from scipy import stats

from mlflow_dr.cli.evaluate import fidelity_command
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.fidelity_study import study as studying
from mlflow_dr.fidelity_study.agreement import FidelityResult
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fidelity_study.report import report_text, values_table, write_files
from mlflow_dr.retrieval import shard_search
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.following import found_checkpoints
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.validations import EvalConfig

SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "diver", "pilot", "star")
PLACES = ("harbour", "wreck", "mast", "island", "channel", "horizon", "port")
PASSAGES, QUERIES = 56, 8
STEPS = (5, 10, 15, 20)
SUBSETS = ("random:12", "bm25@2", "bm25@2+random:12", "full+queries:5")
(MRR,) = parse_measures("mrr@10")


@pytest.fixture
def make_folder(beir_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A function from a name to a collection, its queries in this order."""
    corpus = {
        f"{subject}-{place}": f"the {subject} at the {place} " * (1 + len(place) % 3)
        for subject in SUBJECTS
        for place in PLACES
    }

    def make(name: str = "collection", subjects: Sequence[str] = SUBJECTS) -> Path:
        queries = {
            subject: f"which {subject} is at the {PLACES[len(subject) % 7]}" for subject in subjects
        }
        dev = {subject: {f"{subject}-{PLACES[len(subject) % 7]}": 1} for subject in subjects}
        return beir_folder(corpus, queries, folder=name, dev=dev)

    return make


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture
def output(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Path:
    """The output of a trainer: encoders with different weights for each step."""
    for step in STEPS:
        encoder = make_tiny(seed=step, pooling="mean", normalize=True)
        save_encoder(tmp_path / f"output/checkpoint-{step}", encoder)
    return tmp_path / "output"


@pytest.fixture
def published(run: TrackedRun, output: Path, folder: Path) -> TrackedRun:
    """A run that has published them."""
    run.log_params({"dataset": str(folder), "validation_split": "dev"})
    for step in STEPS:
        publish(run, output / f"checkpoint-{step}", step)
    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passages each pass over the corpus has encoded."""
    counts: list[int] = []
    real = shard_search.SearchShard.__call__

    def counting(self: Any, encoder: Any, table: Any, batches: Any) -> Any:
        batches = list(batches)
        counts.append(sum(map(len, batches)))
        return real(self, encoder, table, batches)

    monkeypatch.setattr(shard_search.SearchShard, "__call__", counting)
    return counts


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are not measured, so that only the study's own passes are counted."""
    timed = lambda self, checkpoints: [float(10 - number) for number in range(len(self._studied))]  # noqa: E731
    monkeypatch.setattr(studying._Study, "seconds", timed)


def asked(*subsets: str, **others: Any) -> FidelityConfig:
    settings = {"device": "cpu", "dtype": "fp32", "measure": str(MRR), "seed": 1} | others
    return FidelityConfig(subset=subsets or SUBSETS, **settings)


def study(run: TrackedRun, *subsets: str, **others: Any) -> FidelityResult:
    return studying.study_fidelity(run_checkpoints(run), asked(*subsets, **others), run)


def called(*argv: object) -> Any:
    return fidelity_command.main([str(word) for word in argv], "mlflow-dr", standalone_mode=False)


def test_one_pass_over_the_corpus_for_each_checkpoint(
    published: TrackedRun, encoded: list[int], untimed: None
) -> None:
    findings = study(published)
    assert encoded == [PASSAGES] * len(STEPS)
    assert findings.steps == STEPS
    assert [subset.curve.name for subset in findings.subsets] == [
        *("random:12, seed 1", "bm25@2", "bm25@2+random:12, seed 1", "full+queries:5, seed 1")
    ]
    assert [len(subset.curve.query_ids) for subset in findings.subsets] == [8, 8, 8, 5]


def test_queries_in_another_order_keep_their_values(
    output: Path,
    make_folder: Callable[..., Path],
    tmp_path: Path,
    untimed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the same collection, as a mirror of it may have them."""
    checkpoints = found_checkpoints(output)
    first, second = make_folder("first"), make_folder("second", SUBJECTS[::-1])

    def values(folder: Path) -> list[float]:
        more = {"dataset": str(folder), "split": "dev"}
        findings = studying.study_fidelity(checkpoints, asked("bm25@2", "full+queries:5", **more))
        return values_table(findings)["value"].to_pylist()

    values(first)
    warm = values(second)
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "empty"))
    assert warm == pytest.approx(values(second))


def test_figures_equal_those_of_separate_validations(
    published: TrackedRun, output: Path, folder: Path
) -> None:
    findings = study(published, "random:12", "bm25@2", "full+queries:5")
    settings = EvalConfig((MRR,), device="cpu", dtype="fp32")
    means = []
    for index, step in enumerate(STEPS):
        encoder = load_encoder(output / f"checkpoint-{step}")
        report = evaluate(encoder, EvalDataset(BeirFolder(folder), "dev"), settings)
        values = [report.per_query[query_id]["mrr@10"] for query_id in findings.full.query_ids]
        assert findings.full.values[index] == pytest.approx(values)
        means.append(report.measures["mrr@10"])
    assert findings.full.means == pytest.approx(means)
    for subset in findings.subsets:
        tau = stats.kendalltau(subset.curve.means, means).statistic
        assert subset.agreement.tau.value == pytest.approx(tau)
        pearson = stats.pearsonr(subset.curve.means, means).statistic
        assert subset.agreement.pearson.value == pytest.approx(pearson)
        chosen = list(subset.curve.means).index(max(subset.curve.means))
        assert subset.agreement.regret.value == pytest.approx(max(means) - means[chosen])
    few = findings.subsets[2].curve
    places = [findings.full.query_ids.index(query_id) for query_id in few.query_ids]
    assert np.array_equal(few.values, findings.full.values[:, places])
    smaller = (findings.subsets[0].curve.values >= findings.full.values).all()
    assert smaller, "a subset's ranks are never worse"


def test_each_strategy_is_timed_separately(published: TrackedRun, encoded: list[int]) -> None:
    """The full corpus and each subset are timed by themselves, once for the same study."""
    findings = study(published, "random:12", "bm25@2")
    sizes = [findings.full.passages, *(subset.curve.passages for subset in findings.subsets)]
    assert sizes[0] == PASSAGES
    timed = encoded[len(STEPS) :]
    assert timed[0] == min(sizes), "the first time does not count"
    assert [size for size in sizes for _ in range(studying.ENOUGH_TIMES)] == timed[1:]
    assert all(
        subset.share == subset.curve.seconds / findings.full.seconds for subset in findings.subsets
    )
    encoded.clear()
    again = study(published, "random:12", "bm25@2")
    assert encoded == []
    assert again.full.seconds == findings.full.seconds


def test_an_interrupted_study_resumes(
    published: TrackedRun, encoded: list[int], untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(published)
    shutil.rmtree(Path(published_cache()))
    encoded.clear()
    real = studying.evaluate_all

    def interrupted(*args: Any) -> Any:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(studying, "evaluate_all", interrupted)
        study(published)
    assert len(encoded) == 2
    findings = study(published)
    assert encoded == [PASSAGES] * len(STEPS)
    assert np.array_equal(findings.full.values, whole.full.values)
    assert [subset.agreement for subset in findings.subsets] == [
        subset.agreement for subset in whole.subsets
    ]


def published_cache() -> str:
    from mlflow_dr.files import cache_dir

    return str(cache_dir() / "fidelity")


def test_another_subset_encodes_only_its_own_passages(
    published: TrackedRun, encoded: list[int], untimed: None
) -> None:
    study(published, "random:12")
    encoded.clear()
    findings = study(published, "random:12", "bm25@2")
    assert encoded == [findings.subsets[1].curve.passages] * len(STEPS)
    encoded.clear()
    study(published, "random:12", "bm25@2", keep_own_id=True)
    assert encoded == [PASSAGES] * len(STEPS), "another configuration has other values"


def test_unreadable_checkpoints_are_passed_over(
    published: TrackedRun, client: MlflowClient, untimed: None, caplog: pytest.LogCaptureFixture
) -> None:
    broken = run_checkpoints(published)[1]
    (Path(broken.location.removeprefix("file://")) / "model.safetensors").write_bytes(b"1")
    findings = study(published)
    assert findings.steps == (5, 15, 20)
    assert list(findings.skipped) == [10]
    assert "step 10 is passed over: " in caplog.text
    with pytest.raises(UsageError, match=r"2 checkpoints to study .1 could not be read.; an order"):
        study(published, steps=(5, 10, 15))


@pytest.mark.parametrize(
    ("subsets", "others", "message"),
    [
        (("full",), {}, "the others are compared with --subset full"),
        (("random:3", "random:3"), {}, "two subsets are called 'random:3, seed 1'"),
        (("random:3",), {"every": 10}, "2 checkpoints to study .of 4 that are complete."),
        (("random:3",), {"steps": (5, 7)}, "no checkpoint of step 7; there are 5, 10, 15, 20"),
        (("random:3",), {"dataset": "dmeo"}, "no dataset 'dmeo'"),
        (("encoder:step-7@3",), {}, "has no published checkpoint of step 7"),
    ],
)
def test_requests_that_cannot_be_studied_are_refused(
    subsets: tuple[str, ...], others: dict[str, Any], message: str, published: TrackedRun
) -> None:
    with pytest.raises(UsageError, match=message):
        study(published, *subsets, **others)
    with pytest.raises(UsageError, match="no subset to study"):
        FidelityConfig()


def test_a_checkpoint_of_the_run_and_a_ranking_make_subsets(
    published: TrackedRun, untimed: None, tmp_path: Path
) -> None:
    lines = [
        f"{subject} {subject}-{place} {-number}"
        for subject in SUBJECTS
        for number, place in enumerate(PLACES)
    ]
    (tmp_path / "lines.tsv").write_text("".join(f"{line}.5\n" for line in lines))
    findings = study(published, "encoder:step-20@2", f"rerank:{tmp_path}/lines.tsv@3")
    assert [subset.curve.slug for subset in findings.subsets] == [
        "encoder_step-20_at_2",
        "rerank_lines_at_3",
    ]
    assert (findings.subsets[1].curve.values >= 0.25).all(), "each ranks four passages at most"


def test_the_command_prints_logs_and_writes(
    client: MlflowClient, published: TrackedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--device", "cpu", "--dtype", "fp32", "--subset", "random:12", "bm25@2")
    called("--run-id", published.id, *flags, "--output", tmp_path / "study")
    printed = capsys.readouterr().out
    assert re.search(r"^full +56 +8 +\d+\.\d\d +- +- +- +- +step \d+$", printed, re.MULTILINE)
    assert re.search(r"^bm25@2 +\d+ +8 +\d", printed, re.MULTILINE)
    assert (tmp_path / "study/report.txt").read_text() == printed
    assert published.fetch().data.metrics == {}  # a table and pictures say more than bars
    files = {file.path for file in client.list_artifacts(published.id, "fidelity")}
    names = ("report.txt", "table.csv", "values.parquet", "curves.png", "time_against_fidelity.png")
    assert files == {f"fidelity/{name}" for name in names}
    fetched = client.download_artifacts(published.id, "fidelity/values.parquet", str(tmp_path))
    assert pq.read_table(fetched) == pq.read_table(tmp_path / "study/values.parquet")


def test_a_directory_needs_no_run(
    folder: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (output / "checkpoint-25").mkdir()
    (output / "notes").mkdir()
    argv = ("--dataset", folder, "--device", "cpu", "--subset", "bm25@2", "--steps", 5, 10, 20)
    called("--checkpoints-dir", output, *argv, "--output", tmp_path / "study")
    assert "3 checkpoints (steps 5 to 20) of 8 queries" in capsys.readouterr().out
    assert (tmp_path / "study/curves.png").exists()
    assert [checkpoint.step for checkpoint in found_checkpoints(output)] == list(STEPS)


def test_nothing_is_logged_with_no_log(client: MlflowClient, published: TrackedRun) -> None:
    called("--run-id", published.id, "--no-log", "--device", "cpu", "--subset", "bm25@2")
    assert not published.fetch().data.metrics
    assert not client.list_artifacts(published.id, "fidelity")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subset", "random:3"], "give --run-id or --checkpoints-dir"),
        (["--checkpoints-dir", ".", "--subset", "random:3"], "without a run, give --dataset"),
        (["--run-id", "0", "--measure", "mrr@10 ndcg@10"], "--measure .* give one, not 2"),
        (["--run-id", "0"], "no subset to study"),
    ],
)
def test_missing_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        called(*flags)


def test_a_directory_that_was_replaced_is_another_checkpoint(tmp_path: Path) -> None:
    """Also by files of equal size and time."""
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    checkpoint = SimpleNamespace(manifest=None, directory=str(tmp_path))
    before, state = studying._identity(checkpoint), weights.stat()  # type: ignore[arg-type]
    time.sleep(0.02)  # longer than the clock of a file system needs to tick
    weights.write_text("two")
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert studying._identity(checkpoint) != before  # type: ignore[arg-type]


def test_estimates_have_rows_with_their_errors_and_intervals(
    published: TrackedRun, untimed: None, encoded: list[int], tmp_path: Path
) -> None:
    found = study(published, "random:60%", "bm25@2+random:100%", estimate=True)
    assert encoded == [PASSAGES] * len(STEPS)
    naive, sampled, _, complete = found.subsets
    assert (sampled.curve.name, sampled.curve.slug) == (
        "random:60%, seed 1, estimated",
        "random_60_percent-seed_1-est",
    )
    assert not naive.is_estimate and sampled.is_estimate
    assert sampled.curve.passages == naive.curve.passages
    # everything is in the sample, so the estimate is the value
    assert complete.curve.means == pytest.approx(found.full.means)
    assert complete.covered is not None and complete.covered.all()
    write_files(found, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        rows = {row["subset"]: row for row in csv.DictReader(file)}
    assert rows["bm25@2+random:100%, seed 1, estimated"]["covered"] == "1.0"
    worst = np.abs(sampled.curve.means - found.full.means).max()
    row = rows["random:60%, seed 1, estimated"]
    assert abs(float(row["worst_error"])) == pytest.approx(worst)
    text = report_text(found)
    assert "random:60%, seed 1, estimated: off by" in text
    assert f"of {len(STEPS)} checkpoints" in text
    again = study(published, "random:60%", estimate=True)
    assert encoded == [PASSAGES] * len(STEPS)  # all is cached
    assert again.subsets[1].curve.intervals == pytest.approx(sampled.curve.intervals)
    with pytest.raises(UsageError, match="--estimate needs a --subset with a random sample"):
        asked("bm25@2", estimate=True)
