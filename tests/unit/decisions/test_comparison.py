"""Comparisons of encoders by values that are known."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlflow_dr.decisions.comparison import (
    Comparison,
    aligned_values,
    changed_most,
    changes_figure,
    compare_values,
    comparison_text,
    write_comparison,
)
from mlflow_dr.decisions.significance import difference, holm
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.terminal import in_columns

OLD = [0.0, 0.5, 1.0, 0.25, 0.0]
NEW = [1.0, 0.5, 0.5, 0.5, 0.0]
ODD = [0.0, 0.0, 1.0, 0.25, 0.2]
Table = dict[str, dict[str, float]]


def table(values: Sequence[float], **others: float) -> Table:
    return {f"q{n}": {"mrr@10": value, **others} for n, value in enumerate(values)}


def comparison(*ranks: Sequence[float], **others: object) -> Comparison:
    labels = ["old", "new", "odd"][: len(ranks)]
    return compare_values(labels, [table(values) for values in ranks], "mrr@10", **others)


def test_each_is_compared_with_the_first() -> None:
    found = comparison(OLD, NEW, ODD, seed=2)
    first, second, third = map(np.array, (OLD, NEW, ODD))
    assert found.differences == (difference(first, second, 2), difference(first, third, 2))
    assert list(found.corrected) == holm([difference.p_value for difference in found.differences])
    assert found.changes.tolist() == [(second - first).tolist(), (third - first).tolist()]
    assert found.means["mrr@10"] == pytest.approx([first.mean(), second.mean(), third.mean()])


def test_the_errors_of_estimates_widen_the_intervals() -> None:
    plain, wide = comparison(OLD, NEW, ODD), comparison(OLD, NEW, ODD, errors=(0.1, 0.0, 0.2))
    for number, error in enumerate((0.1, math.hypot(0.1, 0.2))):
        before, after = plain.differences[number], wide.differences[number]
        assert (after.mean, after.p_value) == (before.mean, before.p_value)
        assert after.high - after.mean == pytest.approx(
            math.hypot(before.high - before.mean, error)
        )


def test_means_are_shown_for_the_measures_that_all_have() -> None:
    tables = [table(OLD, ndcg=0.5, recall=1.0), table(NEW, recall=0.0)]
    assert list(compare_values(["a", "b"], tables, "mrr@10").means) == ["mrr@10", "recall"]


def test_queries_are_matched_by_id_in_the_order_of_the_first() -> None:
    turned = dict(reversed(table(NEW).items()))
    ids, values = aligned_values(["old", "new"], [table(OLD), turned], "mrr@10")
    assert ids == ["q0", "q1", "q2", "q3", "q4"]
    assert values.tolist() == [OLD, NEW]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table(NEW[:3]), "old and new were .* other queries: 2 of 5 are .* latter, and 0 of 3 "),
        (table([*NEW, 1.0]), "0 of 5 are missing from the latter, and 1 of 6 from the former"),
        ({"q0": {"ndcg@10": 1.0}}, "4 of 5 are missing"),
        ({q: {"ndcg@10": 1.0} for q in table(OLD)}, "new has no values of mrr@10; it .*: ndcg@10"),
        (table([1.0, math.nan, math.inf, 0, 0]), "2 values of mrr@10 of new are not finite"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(other: Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare_values(["old", "new"], [table(OLD), other], "mrr@10")


@pytest.mark.parametrize("count", [0, 1, 27])
def test_too_few_or_too_many(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} encoders to compare; expected 2 to 26"):
        compare_values(["x"] * count, [table(OLD)] * count, "mrr@10")


def test_the_queries_that_changed_most() -> None:
    assert changed_most(comparison(OLD, NEW), 10) == [0, 2, 3]
    assert changed_most(comparison(OLD, NEW), 2) == [0, 2]
    # by any of several; of equal changes the earlier query first
    assert changed_most(comparison(OLD, NEW, ODD), 10) == [0, 1, 2, 3, 4]
    assert changed_most(comparison(OLD, OLD), 10) == []


def test_the_comparison_as_text() -> None:
    found = comparison(OLD, NEW, ODD, texts={"q0": "who keeps  " + "x" * 100})
    first, second = found.differences
    assert comparison_text(found, 2).splitlines() == [
        "   mrr@10  mean of 5 queries",
        "A  0.3500  old",
        "B  0.5000  new",
        "C  0.2900  odd",
        f"B - A  mrr@10 +0.1500, {first} (Holm {found.corrected[0]:.4f}); "
        "2 better, 1 worse, 2 equal",
        f"C - A  mrr@10 -0.0600, {second} (Holm {found.corrected[1]:.4f}); "
        "1 better, 1 worse, 3 equal",
        "queries that changed most by mrr@10:",
        "A       B       C       query",
        "0.0000  1.0000  0.0000  q0     who keeps  " + "x" * 69,
        "0.5000  0.5000  0.0000  q1",
    ]
    assert re.fullmatch(r"95 % interval [+-]0\.\d{4} to [+-]0\.\d{4}, p [01]\.\d{4}", str(first))


def test_two_checkpoints_need_no_correction() -> None:
    text = comparison_text(comparison(OLD, NEW), 0)
    assert "Holm" not in text
    assert "changed most" not in text


def test_the_written_files(tmp_path: Path) -> None:
    found = comparison(OLD, NEW, texts={"q0": 'who, "keeps"\nit'})
    write_comparison(found, tmp_path / "new" / "folder")
    with (tmp_path / "new" / "folder" / "values.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["query_id", "query", "A old", "B new"]
    assert rows[1] == ["q0", 'who, "keeps"\nit', "0.0", "1.0"]
    assert [[float(row[2]), float(row[3])] for row in rows[1:]] == found.values.T.tolist()
    picture = tmp_path / "new" / "folder" / "differences.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    write_comparison(found, tmp_path / "new" / "folder")
    assert {path.name for path in picture.parent.iterdir()} == {"values.csv", "differences.png"}


def test_a_label_may_have_any_length_and_characters(tmp_path: Path) -> None:
    names = ["/home/$me/" + "deep/" * 100 + "$old", "new $\\frac$"]
    found = compare_values(names, [table(OLD), table(NEW)], "mrr@10")
    write_comparison(found, tmp_path)
    assert (tmp_path / "differences.png").stat().st_size > 5000


def test_the_picture_has_a_panel_of_each_pair_with_sorted_bars() -> None:
    found = comparison(OLD, NEW, ODD)
    figure = changes_figure(["B - A", "C - A"], found.changes, "mrr@10")
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["B - A", "C - A"]
    assert panels[0].get_ylabel() == "change of mrr@10"
    assert panels[1].get_xlabel() == "5 queries, sorted by change"
    better, worse = panels[0].patches
    assert better.get_data().values.tolist() == [1.0, 0.25, 0.0, 0.0, 0.0]
    assert worse.get_data().values.tolist() == [0.0, 0.0, 0.0, 0.0, -0.5]


def test_the_columns_of_the_table() -> None:
    assert in_columns([("a", "bb"), ("ccc", "")]) == "a    bb\nccc"
