"""What is recommended, and how it is said, written and drawn."""

import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.text import Text

from mlflow_dr.fidelity_study.agreement import FidelityResult, SubsetCurve, compare_curves
from mlflow_dr.fidelity_study.report import (
    curves_figure,
    recommendation,
    report_text,
    time_figure,
    write_files,
)

MakeCurve = Callable[..., SubsetCurve]
MakeResult = Callable[..., FidelityResult]

GOOD = (0.2, 0.4, 0.55, 0.5, 0.6)  # the full corpus's order
CLOSE = (0.2, 0.4, 0.65, 0.5, 0.6)  # chooses step 300, which is 0.08 worse
REVERSED = (0.6, 0.5, 0.45, 0.55, 0.2)
CONSTANT = (0.5,) * 5


def test_the_fastest_trusted_subset_is_recommended(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    findings = make_findings(
        make_curve("random:5", REVERSED, 0.1),
        make_curve("bm25@1", CLOSE, 0.5),
        make_curve("bm25@20", GOOD, 2.0),
        make_curve("bm25@50", GOOD, 4.0),
    )
    assert [subset.curve.name for subset in findings.trusted] == ["bm25@20", "bm25@50"]
    assert findings.recommended is findings.subsets[2]
    advice = recommendation(findings)
    assert advice.startswith("Validate on bm25@20: 20% of the full corpus's time (2.00 s instead ")
    assert "chooses step 500, as the full corpus does (regret 0.0000 mrr@10)" in advice
    assert "tau 1.000" in advice
    assert "differ by +0.1060 from" in advice
    assert "refine" not in advice


def test_a_regret_within_the_tolerance_is_accepted(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    findings = make_findings(make_curve("bm25@1", CLOSE, 0.5), tolerance=0.08)
    assert findings.recommended is findings.subsets[0]
    assert "step 300, the full corpus step 500 (regret 0.0800 mrr@10)" in recommendation(findings)


def test_a_regret_that_is_within_the_tolerance_by_luck_is_reported(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    subset = make_curve("bm25@1", GOOD)
    subset.values[2, :2] += 0.6  # two queries speak for step 300
    findings = make_findings(subset)
    assert findings.subsets[0].agreement.regret.value == 0
    advice = recommendation(findings)
    assert advice.startswith("Validate on bm25@1")
    assert "On other queries the regret might be 0.08" in advice
    assert "`--refine full@3` lets the full corpus decide" in advice


@pytest.mark.parametrize("means", [CLOSE, REVERSED, CONSTANT])
def test_refinement_is_recommended_when_no_subset_is_trusted(
    means: Sequence[float], make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    findings = make_findings(make_curve("random:5", REVERSED), make_curve("bm25@1", means))
    assert findings.recommended is None
    advice = recommendation(findings)
    assert advice.startswith("None of these subsets can be trusted")
    if means is CLOSE:
        assert "the best that bm25@1 finds (`--refine full@3`" in advice


def test_a_flat_curve_gives_no_recommendation(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    full = make_curve("full", CONSTANT, 10.0)
    full.values[:] += np.random.default_rng(1).normal(scale=0.2, size=full.values.shape)
    same = make_curve("bm25@20", full.means)
    assert make_findings(same, full=full.means).recommended  # there all queries say the same
    findings = compare_curves("mrr@10", "sea", "dev", range(5), [full, same])
    assert findings.subsets[0].agreement.regret.value == 0
    assert findings.recommended is None
    assert recommendation(findings).startswith("No order can be told: on the full corpus the ")


def test_a_subset_that_is_not_faster_is_not_recommended(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    findings = make_findings(make_curve("bm25@5000", GOOD, 10.5))
    assert findings.trusted
    assert findings.recommended is None
    assert recommendation(findings).startswith("The full corpus: bm25@5000 can be trusted, but")


def test_the_table_shows_figures_with_their_intervals(
    make_curve: MakeCurve, make_findings: MakeResult
) -> None:
    findings = make_findings(
        make_curve("bm25@20", GOOD, 2.0),
        make_curve("random:5", CONSTANT),
        make_curve("full+queries:10", GOOD, 9.0, queries=10),
    )
    lines = report_text(findings).splitlines()
    cells = [line.split() for line in lines]
    assert cells[3] == ["full", "100", "30", "10.00", *"----", "step", "500"]
    assert cells[4][:8] == ["bm25@20", "100", "30", "2.00", "1.000", "0.997", "0.0000", "+0.1060"]
    assert cells[4][8:] == ["step", "500", "*"]
    assert cells[5][:3] == ["1.000", "to", "1.000"]
    assert cells[6][4:7] == ["-", "-", "0.4000"]
    assert cells[8][:4] == ["full+queries:10", "100", "10", "9.00"]


def test_the_files_have_the_figures_of_the_table(
    make_curve: MakeCurve, make_findings: MakeResult, tmp_path: Path
) -> None:
    findings = make_findings(
        make_curve("bm25@20", GOOD, 2.0),
        make_curve("random:5", CONSTANT),
        make_curve("full+queries:10", GOOD, 9.0, queries=10),
    )
    files = write_files(findings, tmp_path / "study")
    assert sorted(files) == sorted((tmp_path / "study").iterdir())
    assert (tmp_path / "study/report.txt").read_text() == report_text(findings) + "\n"
    with (tmp_path / "study/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["subset"] for row in rows] == ["full", "bm25@20", "random:5", "full+queries:10"]
    assert [row["recommended"] for row in rows] == ["", "yes", "", ""]
    assert [row["tau"] for row in rows] == ["", "1.0", "", "1.0"]
    assert float(rows[1]["pearson_low"]) == findings.subsets[0].agreement.pearson.low
    values = pq.read_table(tmp_path / "study/values.parquet")
    assert values.column_names == ["strategy", "step", "query_id", "value"]
    assert len(values) == 5 * (3 * 30 + 10)
    (found,) = [
        row["value"]
        for row in values.to_pylist()
        if (row["strategy"], row["step"], row["query_id"]) == ("full+queries:10", 300, "q7")
    ]
    assert found == findings.subsets[2].curve.values[2, 7]
    for name in ("curves.png", "time_against_fidelity.png"):
        assert (tmp_path / "study" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("figure", [curves_figure, time_figure])
@pytest.mark.parametrize("slowest", [0.11, 9.0])
def test_the_legend_names_every_curve(
    figure: Callable[[FidelityResult], Any],
    slowest: float,
    make_curve: MakeCurve,
    make_findings: MakeResult,
) -> None:
    """Twelve curves that end at one point, some of them equally fast, and a name with dollars."""
    subsets = [
        make_curve(f"bm25@{number}", GOOD, 0.1 + slowest * (number // 2) / 6)
        for number in range(11)
    ]
    drawn = figure(make_findings(*subsets, make_curve("encoder:a$b$c@10", CONSTANT)))
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    names = legend.get_texts()
    expected = ["full", *(f"bm25@{number}" for number in range(11)), "encoder:a$b$c@10"]
    assert [name.get_text() for name in names][:13] == expected
    boxes = [Text.get_window_extent(name) for name in names]
    heights = sorted((box.y0 + box.y1) / 2 for box in boxes)
    line = 9 / 72 * drawn.dpi  # the height of letters
    assert all(upper - lower >= line for lower, upper in pairwise(heights))
    right, top = drawn.bbox.max
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= right
        assert 0 <= box.y0 < box.y1 <= top
        assert all(box.x0 >= panel.bbox.x1 for panel in drawn.axes)
    styles = [(handle.get_color(), handle.get_linestyle()) for handle in legend.legend_handles]
    if figure is curves_figure:
        assert len(set(styles)) == 13
