"""Another collection, or a suite of them, compared with the full one."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.fidelity_study.agreement import FidelityResult, agreement
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fidelity_study.report import report_text, values_table, write_files
from mlflow_dr.fidelity_study.resampling import independent, paired
from mlflow_dr.fidelity_study.study import _Study, study_fidelity
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.following import found_checkpoints
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.validations import EvalConfig

STEPS = (1, 2, 3)
SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "diver")
PLACES = ("harbour", "wreck", "mast", "island")
(MRR,) = parse_measures("mrr@10")


@pytest.fixture
def output(
    make_tiny: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    for step in STEPS:
        encoder = make_tiny(seed=step, pooling="mean", normalize=True)
        save_encoder(tmp_path / f"output/checkpoint-{step}", encoder)
    seconds = lambda self, checkpoints: [1.0 + len(each.query_ids) for each in self._studied]  # noqa: E731
    monkeypatch.setattr(_Study, "seconds", seconds)
    return tmp_path / "output"


@pytest.fixture
def make_folder(beir_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A function to a collection of some subjects, and a word that stands in its queries."""

    def make(name: str, n_subjects: int, n_queries: int, word: str = "which") -> Path:
        corpus = {
            f"{subject}-{place}": f"the {subject} at the {place}"
            for subject in SUBJECTS[:n_subjects]
            for place in PLACES
        }
        chosen = SUBJECTS[:n_queries]
        queries = {subject: f"{word} {subject} at {PLACES[len(subject) % 4]}" for subject in chosen}
        dev = {subject: {f"{subject}-{PLACES[len(subject) % 4]}": 1} for subject in chosen}
        return beir_folder(corpus, queries, folder=name, dev=dev)

    return make


def study(output: Path, dataset: object, *against: object, **others: Any) -> FidelityResult:
    config = FidelityConfig(
        dataset=str(dataset),
        against=tuple(map(str, against)),
        measure=str(MRR),
        **{"device": "cpu", "dtype": "fp32", **others},
    )
    return study_fidelity(found_checkpoints(output), config)


def means(output: Path, folder: Path) -> list[float]:
    """The values of the checkpoints on a collection, each validated by itself."""
    data = EvalDataset(open_collection(str(folder)), "dev")
    settings = EvalConfig((MRR,), device="cpu", dtype="fp32")
    return [
        evaluate(load_encoder(output / f"checkpoint-{step}"), data, settings, True).measures[MRR]
        for step in STEPS
    ]


def test_a_smaller_collection_is_a_row_beside_subsets(
    output: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    full, nano = make_folder("full", 6, 6), make_folder("nano", 3, 3)
    found = study(output, full, nano, subset="random:8")
    subset, other = found.subsets
    assert (other.curve.name, other.curve.passages, len(other.curve.query_ids)) == ("nano", 12, 3)
    assert other.curve.is_other and not other.curve.has_own_queries
    assert not subset.curve.is_other
    assert found.full.means == pytest.approx(means(output, full))
    assert other.curve.means == pytest.approx(means(output, nano))
    tau = stats.kendalltau(found.full.means, other.curve.means).statistic
    assert other.agreement.tau.value == pytest.approx(tau, nan_ok=True)
    difference = np.mean(other.curve.means - found.full.means)
    assert other.agreement.inflation.value == pytest.approx(difference)
    assert other.agreement.inflation.has_interval
    text = report_text(found)
    assert "6 queries of" in text and "\nnano " in text
    write_files(found, tmp_path / "study")


def test_queries_of_other_texts_are_drawn_by_themselves(
    output: Path, make_folder: Callable[..., Path]
) -> None:
    full, other = make_folder("full", 6, 6), make_folder("other", 6, 5, word="what")
    found = study(output, full, other)
    (row,) = found.subsets
    assert row.curve.has_own_queries
    pairing = independent((6,), (5,))
    expected = agreement(found.full.values, row.curve.values, pairing=pairing)
    assert row.agreement.inflation == expected.inflation


def test_a_suite_is_compared_by_its_mean_and_by_each_collection(
    output: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    sea, sky = make_folder("sea", 6, 6), make_folder("sky", 5, 4)
    small = make_folder("small", 3, 3), make_folder("tiny", 2, 2)
    found = study(output, f"{sea}+{sky}", f"{small[0]}+{small[1]}", subset="bm25@2")
    assert list(found.collections) == ["sea", "sky"]
    whole = np.mean([means(output, folder) for folder in (sea, sky)], axis=0)
    nano = np.mean([means(output, folder) for folder in small], axis=0)
    subset, other = found.subsets
    assert found.full.means == pytest.approx(whole)
    assert other.curve.means == pytest.approx(nano)
    assert (other.curve.name, other.curve.sizes) == ("small+tiny", (3, 2))
    assert other.agreement.inflation.value == pytest.approx(np.mean(nano - whole))
    assert found.collections["sky"].subsets[1].curve.means == pytest.approx(means(output, small[1]))
    assert subset.curve.passages == sum(
        each.subsets[0].curve.passages for each in found.collections.values()
    )
    text = report_text(found)
    assert "10 queries of sea+sky, with" in text
    assert "\nsky " in text.partition("of each collection:")[2]
    assert set(values_table(found)["query_id"].to_pylist()) >= {"sea/gull", "sky/gull"}
    write_files(found, tmp_path / "study")
    with (tmp_path / "study/table.csv").open() as file:
        names = [row["subset"] for row in csv.DictReader(file)]
    assert names[:4] == ["full", "bm25@2", "small+tiny", "sea: full"]


def test_what_cannot_be_compared(output: Path, make_folder: Callable[..., Path]) -> None:
    sea, sky = make_folder("sea", 6, 6), make_folder("sky", 5, 4)
    with pytest.raises(UsageError, match="sky has 1 collections, and --dataset has 2"):
        study(output, f"{sea}+{sky}", sky)
    with pytest.raises(UsageError, match="two collections are called 'sky'"):
        study(output, sea, sky, sky)
    with pytest.raises(UsageError, match="the mean of a suite has no interval"):
        study(output, f"{sea}+{sky}", subset="random:5", estimate=True)
    suite = output / "suite.yaml"
    suite.write_text(f"sea: {{dataset: {sea}, dims: 8}}\n")
    with pytest.raises(UsageError, match=r"sea: a study takes of a suite dataset, .*, not dims"):
        study(output, suite, subset="random:5")


def test_collections_of_a_suite_are_drawn_by_themselves() -> None:
    pairing = paired(np.array([5, 1, 0]), (3, 3))
    assert list(pairing.sizes) == [2, 1, 1, 2]
    assert sorted(pairing.full.tolist()) == list(range(6))
    assert pairing.subset.tolist() == pairing.full[[5, 1, 0]].tolist()
    assert pairing.subset.tolist() == [3, 0, 1]
    # values that differ between collections only have an exact mean
    values = np.repeat([[0.1, 0.9], [0.3, 0.5]], 3, axis=1)
    same = paired(np.arange(6), (3, 3))
    assert agreement(values, values, pairing=same).inflation == (0, 0, 0)
    shifted = agreement(values, values + 0.1, pairing=independent((3, 3), (3, 3)))
    assert shifted.inflation == pytest.approx((0.1, 0.1, 0.1))
    mixed = agreement(values, values + 0.1, pairing=independent((6,), (6,)))
    assert mixed.inflation.high > 0.2
