"""Estimates of a validation, over a small collection whose full corpus is measured, too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.tracking.artifacts import per_query_values
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate, evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig
from mlflow_dr.validation.validator import run_validator

WORDS = ("gull", "ship", "otter", "storm", "ferry", "diver", "pilot", "star", "mast", "wreck")
MEASURES = parse_measures("mrr@10 ndcg@10 recall@20")
PASSAGES = 400


@pytest.fixture(scope="module")
def words() -> dict[str, str]:
    random = np.random.default_rng(0)
    return {
        f"p{number}": " ".join(random.choice(WORDS, random.integers(2, 9)))
        for number in range(PASSAGES)
    }


@pytest.fixture
def folder(beir_folder: Callable[..., Path], words: dict[str, str]) -> Path:
    random = np.random.default_rng(1)
    dev = {
        f"q{number}": {f"p{row}": int(gain) for row, gain in zip(rows, gains, strict=True)}
        for number in range(20)
        for rows, gains in [(random.choice(PASSAGES, 2, False), random.integers(1, 3, 2))]
    }
    queries = {query: words[next(iter(judged))][:14] for query, judged in dev.items()}
    dev["q0"]["not-in-the-corpus"] = 2
    return beir_folder(words, queries, dev=dev)


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True)


def settings(*, estimate: bool = True, **more: Any) -> EvalConfig:
    return EvalConfig(MEASURES, device="cpu", dtype="fp32", estimate=estimate, **more)


def report_on(encoder: Encoder, folder: Path, subset: str | None, **more: Any) -> Report:
    data = EvalDataset(BeirFolder(folder), "dev")
    asked = settings(estimate=subset is not None, **more)
    if subset is not None:
        data = data.on_subset(parse_subset(subset), asked)
    return evaluate(encoder, data, asked, quiet=True)


def test_a_sample_of_everything_gives_the_values_of_the_full_corpus(
    encoder: Encoder, folder: Path
) -> None:
    full = report_on(encoder, folder, None)
    for subset in ("random:100%", "random:100%+bm25@3"):
        report = report_on(encoder, folder, subset)
        for query_id, values in full.per_query.items():
            assert report.per_query[query_id] == pytest.approx(values, abs=1e-9)
        assert report.intervals["mrr@10"] == pytest.approx((full.measures["mrr@10"],) * 3)
        assert report.ranking == full.ranking


def test_estimates_are_closer_than_the_values_on_the_subset(encoder: Encoder, folder: Path) -> None:
    full = report_on(encoder, folder, None)
    asked = settings(estimate=False)
    for subset in ("random:25%", "bm25@5+random:25%"):
        data = EvalDataset(BeirFolder(folder), "dev").on_subset(parse_subset(subset), asked)
        naive = evaluate(encoder, data, asked, quiet=True)
        report = report_on(encoder, folder, subset)
        assert report.passages == naive.passages
        for measure in MEASURES:
            error = abs(report.measures[measure] - full.measures[measure])
            assert error < 0.6 * abs(naive.measures[measure] - full.measures[measure])
            interval = report.intervals[measure]
            assert interval.low < interval.value < interval.high
            assert report.measures[measure] == pytest.approx(interval.value)


def test_the_passage_of_a_querys_own_id_is_left_out(
    encoder: Encoder, beir_folder: Callable[..., Path], words: dict[str, str]
) -> None:
    folder = beir_folder(words, {"p1": words["p1"]}, folder="own", dev={"p1": {"p1": 1, "p2": 1}})
    left_out = report_on(encoder, folder, "random:100%")
    kept = report_on(encoder, folder, "random:100%", keep_own_id=True)
    assert kept.measures["mrr@10"] == pytest.approx(1)
    assert left_out.measures["mrr@10"] < 1


def test_a_run_gets_estimates_with_intervals_under_a_name_of_their_own(
    client: MlflowClient,
    run: TrackedRun,
    folder: Path,
    publishing: Callable[[int], str],
) -> None:
    publishing(1)
    config = ValidateConfig(
        dataset=str(folder),
        split=("dev",),
        measures="mrr@10 ndcg@10",
        device="cpu",
        dtype="fp32",
        subset=("full", "random:25%"),
        estimate=True,
        follow=False,
    )
    assert [validation.name for validation in config.all_validations] == ["val", "val-est"]
    assert run_validator(FollowedRun(run), config).done == 1
    metrics = client.get_run(run.id).data.metrics
    value = metrics["val-est/ndcg_at_10"]
    assert metrics["val-est/ndcg_at_10/low"] <= value < metrics["val-est/ndcg_at_10/high"]
    assert abs(value - metrics["val/ndcg_at_10"]) < 0.1
    (checkpoint,) = run_checkpoints(run)
    values = per_query_values(run, checkpoint, "val-est")
    assert np.mean([row["ndcg@10"] for row in values.values()]) == pytest.approx(value)


def test_the_target_error_sizes_the_sample(
    encoder: Encoder, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_encoder(tmp_path / "encoder", encoder)
    caplog.set_level("INFO")
    options = {"dataset": str(folder), "split": "dev", "device": "cpu", "dtype": "fp32"}
    passages = [
        evaluate_encoder(
            EvaluateConfig(
                encoder=str(tmp_path / "encoder"),
                estimate=True,
                target_error=error,
                output=tmp_path / f"{error}.json",
                **options,
            )
        ).passages
        for error in (0.03, 0.08)
    ]
    assert passages[0] > passages[1]
    assert "--target-error 0.08: the sample is random:24%" in caplog.text
    assert "random:24%: the sample adds only" in caplog.text
    low, high = json.loads((tmp_path / "0.03.json").read_text())["intervals"]["mrr@10"]
    assert 0 <= low < high <= 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"subset": ("bm25@5",)}, r"bm25@5: an estimate needs a random sample, such as random:5%"),
        ({"subset": ("rerank:top.trec@5",)}, "each query ranks its own passages only"),
        ({"subset": ("random:5%+queries:3",)}, "an estimate is of all queries"),
        ({"subset": ("full",)}, "--estimate needs a sample of the corpus"),
        ({}, "--estimate needs a sample of the corpus"),
        ({"subset": ("random:101%",)}, "not a share above 0% and up to 100%"),
        ({"subset": ("random:auto",)}, "--target-error chooses the size of random:auto"),
        ({"subset": ("random:5%",), "target_error": 0.01}, "--target-error chooses the size"),
        ({"subset": ("random:5%",), "measures": "judged@10"}, "judged@10 cannot be estimated"),
        ({"subset": ("random:5%",), "measures": "accuracy@5"}, "accuracy@5 cannot be estimated"),
        ({"subset": ("random:5%",), "depth": 5}, "depth 5 is too shallow"),
        ({"subset": ("random:5%", "random:10%")}, "two validations are called 'val-est'"),
        ({"estimate": False, "target_error": 0.01}, "--target-error is of --estimate"),
        ({"subset": ("random:5%",), "target_error": 1.5}, "target_error"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ValidateConfig(**{"estimate": True, **options}).all_validations  # noqa: B018


def test_a_sample_size_without_a_target_is_refused_when_it_is_drawn(folder: Path) -> None:
    data = EvalDataset(BeirFolder(folder), "dev")
    with pytest.raises(UsageError, match="random:auto: use it with --estimate and --target-error"):
        data.on_subset(parse_subset("random:auto"), settings(estimate=False))


def test_a_sample_outside_of_the_other_terms_must_be_large_enough(
    encoder: Encoder, folder: Path
) -> None:
    for subset in ("random:3", "bm25@3+random:5"):
        with pytest.raises(UsageError, match=r"the sample has \d passages that are not judged"):
            report_on(encoder, folder, subset)


def test_estimates_are_refined_by_the_full_corpus() -> None:
    config = ValidateConfig(subset=("random:5%",), estimate=True, refine="full@2")
    cheap, expensive = config.all_validations
    assert (cheap.name, expensive.name) == ("val-est", "val")
    assert not expensive.settings.estimate
    assert expensive.refines is not None and expensive.refines.name == "val-est"
