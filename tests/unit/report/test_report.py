"""A run on one page, as a picture and as a table."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.cli.report import ReportConfig, report_command
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.report.contents import RunReport, read_report
from mlflow_dr.report.figures import curve_figure
from mlflow_dr.report.page import report_page
from mlflow_dr.report.tables import latex_table, markdown_table
from mlflow_dr.report.writing import log_report
from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun

RANKS = {0: [0.0, 0.1, 0.0, 0.2], 5: [0.5, 1.0, 0.5, 1.0], 9: [1.0, 0.25, 0.5, 1.0]}


@pytest.fixture
def run_with_figures(run: TrackedRun, measured: Callable) -> TrackedRun:
    """Three checkpoints with values of single queries; a subset has figures of two of them."""
    for step, ranks in RANKS.items():
        measured(step, sum(ranks) / 4, ranks)
        checkpoint = run_checkpoints(run)[-1]
        texts = {"q1": "a <b>bold</b>, \nquestion", "q0": "what is the sea"}
        values = {f"q{n}": {"mrr@10": rank, "ndcg@10": 1 - rank} for n, rank in enumerate(ranks)}
        log_per_query_values(run, checkpoint, "val", values, texts)
        if step:
            measured(step, 0.9, name="val-few_100")
    run.log_params({"model": "tiny", "dataset": "sea"})
    return run


@pytest.fixture
def report(run_with_figures: TrackedRun) -> RunReport:
    run_with_figures.fetch()
    return read_report(run_with_figures)


def test_the_report_has_curves_intervals_and_queries(report: RunReport) -> None:
    assert [curve.name for curve in report.curves] == ["val", "val-few_100"]
    assert report.curves[0].steps == [0, 5, 9]
    assert report.best.checkpoint.step == 5
    low, high = report.curves[0].intervals[5]["mrr_at_10"]
    assert 0.5 <= low < 0.75 < high <= 1
    assert report.curves[1].intervals == {5: {}, 9: {}}  # no values of single queries
    assert [(query.query_id, query.before, query.after) for query in report.won] == [
        ("q1", 0.25, 1.0)
    ]
    assert [(query.text, query.after - query.before) for query in report.lost] == [
        ("what is the sea", -0.5)
    ]
    assert report.change is not None
    assert report.change.mean == pytest.approx(0.75 - 0.6875)


def test_the_page_needs_nothing_else_and_shows_texts_as_they_are(report: RunReport) -> None:
    page = report_page(report)
    assert not re.search(r"<script|\bon\w+=|@import|(src|href)=\"(?!#)", page)
    assert "a &lt;b&gt;bold&lt;/b&gt;, \\nquestion" in page
    for shown in (
        "Best: step 5, mrr@10 0.7500",
        "difference +0.0625 over 4 queries",
        "val-few_100",
    ):
        assert shown in page
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawn)


def test_subsets_are_beside_the_full_corpus_in_the_picture(report: RunReport) -> None:
    (panel,) = curve_figure(report).axes
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["val: full corpus", "val-few_100: full corpus", "best"]


def test_tables_for_papers(report: RunReport) -> None:
    lines = markdown_table(report).splitlines()
    assert lines[0] == "| validation | checkpoint | step | mrr@10 | ndcg@10 |"
    assert re.match(r"\| val \| best \| 5 \| 0\.7500 \[0\.\d{4}, [01]\.\d{4}\] \| ", lines[3])
    assert lines[-1].startswith("| val-few_100 | last | 9 | 0.9000 | 0.1000 |")
    latex = latex_table(report)
    assert r"val-few\_100 & last & 9 & 0.9000 & 0.1000 \\" in latex
    assert latex.startswith("\\begin{tabular}{llrll}\n\\toprule\n")


def test_the_report_is_kept_with_the_run_and_its_description_links_to_it(
    report: RunReport, client: MlflowClient
) -> None:
    log_report(report)
    files = {file.path for file in client.list_artifacts(report.run.id, "report")}
    names = ("report.html", "curve.svg", "curve.png", "table.md")
    assert files == {f"report/{name}" for name in names}
    note = report.run.fetch().data.tags["mlflow.note.content"]
    assert f"[Report](get-artifact?path=report%2Freport.html&run_uuid={report.run.id})" in note


def test_a_run_without_figures_is_one_clear_error(run: TrackedRun, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="has no validation yet; `mlflow-dr validate --run-id"):
        read_report(run)
    with pytest.raises(UsageError, match=r"curve\.gif: the name of a picture ends in \.svg, "):
        report_command.callback.__wrapped__(
            ReportConfig(run=run.id, picture=tmp_path / "curve.gif")
        )
