"""One evaluation without tracking: what is written, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.vector_form import VectorForm
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation import evaluate as evaluate_module
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate, evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder], tmp_path: Path) -> str:
    save_encoder(tmp_path / "encoder", make_tiny(pooling="mean"))
    return str(tmp_path / "encoder")


def asked(encoder: str, folder: Path, **others: Any) -> EvaluateConfig:
    return EvaluateConfig(
        encoder=encoder, dataset=str(folder), device="cpu", dtype="fp32", **others
    )


@pytest.mark.parametrize(("query_id", "passage_id"), [("q 1", "p2"), ("q1", "p\t2"), ("q1", "p 2")])
def test_ids_that_no_ranking_holds_are_refused_before_anything_is_encoded(
    encoder: str,
    beir_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    query_id: str,
    passage_id: str,
) -> None:
    passages = {"p1": "a tug", passage_id: "a liner"}
    folder = beir_folder(passages, {query_id: "which ship"}, dev={query_id: {"p1": 1}})
    evaluated = evaluate_encoder(asked(encoder, folder, output=tmp_path / "first.json"))
    assert evaluated.ranking.keys() == {query_id}
    monkeypatch.setattr(evaluate_module, "evaluate_all", lambda *_: pytest.fail("encoded"))
    with pytest.raises(DataError, match="cannot hold white space in ids"):
        evaluate_encoder(asked(encoder, folder, ranking=tmp_path / "ranking.trec"))


def test_only_the_ids_of_a_subset_count(
    encoder: str, beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = beir_folder(
        {"p1": "a ship", "p 2": "a tug"}, {"q1": "which ship"}, dev={"q1": {"p1": 1}}
    )
    ranking = tmp_path / "ranking.trec"
    evaluate_encoder(asked(encoder, folder, subset="bm25@1", ranking=ranking))
    assert ranking.read_text().split()[:3] == ["q1", "Q0", "p1"]


def test_the_report_is_written_when_the_ranking_cannot_be(
    encoder: str, beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = beir_folder({"p1": "a tug"}, {"q1": "which ship"}, dev={"q1": {"p1": 1}})
    ranking, output = tmp_path / "ranking", tmp_path / "report.json"
    (ranking / "folder").mkdir(parents=True)
    with pytest.raises(OSError, match="ranking"):
        evaluate_encoder(asked(encoder, folder, ranking=ranking, output=output))
    assert json.loads(output.read_text())["queries"].keys() == {"q1"}


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships"},
        dev={"q1": {"p0": 1}},
    )


def test_a_subset_by_a_checkpoint_of_the_server_that_is_named(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    folder: Path,
    tmp_path: Path,
) -> None:
    publishing(1)
    (checkpoint,) = run_checkpoints(run)
    request = EvaluateConfig(
        encoder=str(tmp_path / "step-1"),
        dataset=str(folder),
        split="dev",
        device="cpu",
        subset=f"encoder:{checkpoint.uri}@2",
        tracking_uri=client.tracking_uri,
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/another.db")
    try:
        assert evaluate_encoder(request).passages in (2, 3)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_suite_has_a_line_for_each_collection_and_their_mean(
    encoder: str, folder: Path, beir_folder: Callable[..., Path], run: TrackedRun, tmp_path: Path
) -> None:
    passages = {f"p{number}": f"ships {number}" for number in range(5)}
    other = beir_folder(passages, {"q": "ships 4"}, folder="other", dev={"q": {"p4": 1}})
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"sea: {folder}\nsky: {{dataset: {other}, query_prompt: 'of '}}\n")
    output = tmp_path / "report.json"
    report = evaluate_encoder(asked(encoder, suite, measures="mrr@10", output=output), run)
    sea = evaluate_encoder(asked(encoder, folder, measures="mrr@10"))
    sky = evaluate_encoder(asked(encoder, other, measures="mrr@10", query_prompt="of "))
    ((mean),) = report.measures.values()
    each = [next(iter(one.measures.values())) for one in (sea, sky)]
    assert mean == pytest.approx(sum(each) / 2)
    lines = [line.split() for line in repr(report).splitlines()]
    values = [f"{value:.4f}" for value in (*each, mean)]
    assert lines[:4] == [
        ["collection", "mrr@10"],
        *map(list, zip(("sea", "sky", "mean"), values, strict=True)),
    ]
    assert report.frame().index.tolist() == ["sea", "sky"]
    assert "<td>sky</td>" in report._repr_html_()
    written = json.loads(output.read_text())
    assert written["measures"] == report.measures
    assert written["collections"]["sky"]["queries"] == {"q": sky.per_query["q"]}
    assert run.fetch().data.metrics.keys() == {*("mrr_at_10", "sea/mrr_at_10", "sky/mrr_at_10")}
    for refused in ({"ranking": tmp_path / "ranking"}, {"estimate": True, "subset": "random:5"}):
        with pytest.raises(UsageError, match=r"of a suite has no interval|a suite has one for"):
            asked(encoder, suite, **refused)
    with pytest.raises(UsageError, match="sky: no key 'refine'"):
        suite.write_text(f"sea: {folder}\nsky: {{dataset: {other}, refine: full@3}}\n")
        asked(encoder, suite)


def test_fewer_dimensions_and_bits_have_figures_of_their_own(
    encoder: str, folder: Path, run: TrackedRun, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    forms = {"dims": ("4",), "precision": ("int8",)}
    report = evaluate_encoder(
        asked(encoder, folder, measures="mrr@10", output=output, **forms), run
    )
    assert list(report.forms) == ["int8", "4d", "4d-int8"]
    data = EvalDataset(open_collection(str(folder)), "dev")
    for name, form in (("int8", VectorForm(None, "int8")), ("4d", VectorForm(4, "float32"))):
        settings = asked(encoder, folder, measures="mrr@10").eval_config().of_form(form)
        alone = evaluate(load_encoder(encoder), data, settings, quiet=True)
        assert report.forms[name].per_query == alone.per_query
    alone = evaluate_encoder(asked(encoder, folder, measures="mrr@10"))
    assert report.per_query == alone.per_query
    lines = [line.partition("\t")[0] for line in repr(report).splitlines()[:-1]]
    assert lines == ["mrr@10", "int8 mrr@10", "4d mrr@10", "4d-int8 mrr@10"]
    assert "<td>4d mrr@10</td>" in report._repr_html_()
    written = json.loads(output.read_text())
    assert written["forms"]["4d"]["queries"] == report.forms["4d"].per_query
    names = {"mrr_at_10", "int8/mrr_at_10", "4d/mrr_at_10", "4d-int8/mrr_at_10"}
    assert run.fetch().data.metrics.keys() == names
    with pytest.raises(UsageError, match="dims"):
        evaluate_encoder(asked(encoder, folder, dims=("99999",)))


def test_a_suite_has_a_line_for_each_collection_in_each_form(
    encoder: str, folder: Path, beir_folder: Callable[..., Path]
) -> None:
    other = beir_folder({"p": "a tug"}, {"q": "a ship"}, folder="other", dev={"q": {"p": 1}})
    suite = f"{folder}+{other}"
    report = evaluate_encoder(asked(encoder, Path(suite), measures="mrr@10", dims=("4",)))
    rows = [line.rsplit(maxsplit=1)[0].strip() for line in repr(report).splitlines()[1:-1]]
    names = [folder.name, other.name, "mean"]
    assert rows == [f"{name}{form}" for name in names for form in ("", " 4d")]
    of_form = [each.forms["4d"].measures["mrr@10"] for each in report.collections.values()]
    assert report.forms["4d"].measures["mrr@10"] == pytest.approx(sum(of_form) / 2)
