"""Several encoders on the same queries: means, differences, and the queries that changed most."""

from __future__ import annotations

import csv
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlflow_dr import pages
from mlflow_dr.decisions.significance import Difference, difference, holm
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.files import atomic_write
from mlflow_dr.terminal import in_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LETTERS = string.ascii_uppercase
VALUES, PICTURE = "values.csv", "differences.png"
SHOWN_CHANGED = 10
LONGEST_TEXT = 80
LONGEST_LABEL = 100
WIDTH, HEIGHT, DPI = 9.0, 3.4, 120  # inches, of each panel of the picture; dots per inch
BETTER, WORSE = "tab:blue", "tab:red"


@dataclass(frozen=True)
class Comparison:
    """Several encoders on the same queries, each compared with the first.

    Attributes:
        labels: names of the encoders.
        measure: the measure that is compared.
        means: means of all measures that each of them has, `measure -> (n_encoders,)`.
        query_ids: the queries.
        values: `(n_encoders, n_queries) float64`.
        differences: the difference of each other encoder from the first.
        corrected: their p-values by Holm's rule, since there are several.
        texts: of the queries, by id, where they are known.
    """

    labels: tuple[str, ...]
    measure: str
    means: Mapping[str, Sequence[float]]
    query_ids: list[str]
    values: np.ndarray
    differences: tuple[Difference, ...]
    corrected: tuple[float, ...]
    texts: Mapping[str, str]

    @property
    def changes(self) -> np.ndarray:
        """Changes from the first encoder, query by query, `(n_encoders - 1, n_queries)`."""
        changes: np.ndarray = self.values[1:] - self.values[0]
        return changes

    def frame(self) -> pd.DataFrame:
        """A row for each query, named by its id: its text, and a column for each encoder."""
        import pandas as pd

        columns = dict(zip(LETTERS, self.values, strict=False))
        texts = [self.texts.get(query_id, "") for query_id in self.query_ids]
        return pd.DataFrame({"query": texts, **columns}, index=self.query_ids)

    def __repr__(self) -> str:
        return comparison_text(self, SHOWN_CHANGED)

    def _repr_html_(self) -> str:
        return f"{pages.code(repr(self))}\n{pages.picture(differences_figure(self))}"


def compare_values(
    labels: Sequence[str],
    tables: Sequence[Mapping[str, Mapping[str, float]]],
    measure: str,
    seed: int = 0,
    texts: Mapping[str, str] | None = None,
    errors: Sequence[float] = (),
) -> Comparison:
    """Compare encoders with the first of them.

    Args:
        labels: what they are called.
        tables: of each, query id -> measure -> value.
        measure: what is compared.
        seed: random seed of the test and the bootstrap.
        texts: of the queries, by id.
        errors: half the widths of the intervals of means that are estimates, and 0 of others; none
            are estimates when empty.

    Raises:
        UsageError: fewer than two encoders, or more than there are letters.
        DataError: the queries differ, the measure is missing, or a value is no number.
    """
    check_count(len(labels))
    ids, values = aligned_values(labels, tables, measure)
    differences = tuple(difference(values[0], other, seed) for other in values[1:])
    if any(errors):
        differences = tuple(
            result.widened(errors[0], error)
            for result, error in zip(differences, errors[1:], strict=True)
        )
    measures = [
        name for name in tables[0][ids[0]] if all(name in table[ids[0]] for table in tables)
    ]
    return Comparison(
        labels=tuple(labels),
        measure=measure,
        means={
            name: aligned_values(labels, tables, name)[1].mean(axis=1).tolist() for name in measures
        },
        query_ids=ids,
        values=values,
        differences=differences,
        corrected=tuple(holm([result.p_value for result in differences])),
        texts=texts or {},
    )


def check_count(encoders: int) -> None:
    """Refuse to compare fewer than two encoders, or more than there are letters.

    Raises:
        UsageError: with their number.
    """
    if not 2 <= encoders <= len(LETTERS):
        raise UsageError(f"{encoders} encoders to compare; expected 2 to {len(LETTERS)}")


def changed_most(comparison: Comparison, count: int) -> list[int]:
    """Indices of the queries whose values differ most from the first encoder's, the most first."""
    largest = np.abs(comparison.changes).max(axis=0)
    order = np.argsort(-largest, kind="stable")[:count]
    return [int(index) for index in order if largest[index] > 0]


def comparison_text(comparison: Comparison, changed: int) -> str:
    """The comparison in a few lines.

    Args:
        comparison: what was found.
        changed: how many of the queries that changed most are shown.
    """
    letters = LETTERS[: len(comparison.labels)]
    means = [
        ("", *comparison.means, f"mean of {len(comparison.query_ids)} queries"),
        *(
            (letter, *(f"{mean[index]:.4f}" for mean in comparison.means.values()), label)
            for index, (letter, label) in enumerate(zip(letters, comparison.labels, strict=True))
        ),
    ]
    lines = [in_columns(means)]
    for letter, result, corrected, change in zip(
        letters[1:],
        comparison.differences,
        comparison.corrected,
        comparison.changes,
        strict=True,
    ):
        holms = f" (Holm {corrected:.4f})" if len(comparison.differences) > 1 else ""
        lines.append(
            f"{letter} - A  {comparison.measure} {result.mean:+.4f}, {result}{holms}; "
            f"{_counts(change)}"
        )
    indices = changed_most(comparison, changed)
    if indices:
        rows = [
            (
                *(f"{value:.4f}" for value in comparison.values[:, index]),
                comparison.query_ids[index],
                comparison.texts.get(comparison.query_ids[index], "")[:LONGEST_TEXT],
            )
            for index in indices
        ]
        lines.append(f"queries that changed most by {comparison.measure}:")
        lines.append(in_columns([(*letters, "query", ""), *rows]))
    return "\n".join(lines)


def check_comparison_output(directory: Path | None, force: bool) -> None:
    """Refuse to replace files, unless `force` is given.

    Raises:
        UsageError: with the file that is there.
    """
    for name in (VALUES, PICTURE):
        if directory is not None and not force and (directory / name).exists():
            raise UsageError(f"{directory / name}: exists already; --force replaces it")


def write_comparison(comparison: Comparison, directory: Path) -> None:
    """Write the values of all queries as `values.csv`, and a picture of the differences.

    Args:
        comparison: what was found.
        directory: is created if it does not exist.
    """
    heads = _heads(comparison)
    with (
        atomic_write(directory / VALUES) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["query_id", "query", *heads])
        for query_id, values in zip(comparison.query_ids, comparison.values.T, strict=True):
            rows.writerow([query_id, comparison.texts.get(query_id, ""), *values.tolist()])
    with atomic_write(directory / PICTURE) as partial:
        differences_figure(comparison).savefig(partial, format="png", dpi=DPI)


def differences_figure(comparison: Comparison) -> Figure:
    """The picture of the differences from the first encoder."""
    heads = _heads(comparison)
    titles = [
        f"{_end(heads[index])}\nless {_end(heads[0])}\n"
        f"{result.mean:+.4f} on average; {_counts(change)}"
        for index, (result, change) in enumerate(
            zip(comparison.differences, comparison.changes, strict=True), start=1
        )
    ]
    return changes_figure(titles, comparison.changes, comparison.measure)


def _heads(comparison: Comparison) -> list[str]:
    return [f"{a} {b}" for a, b in zip(LETTERS, comparison.labels, strict=False)]


def _counts(change: np.ndarray) -> str:
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return f"{better} better, {worse} worse, {len(change) - better - worse} equal"


def _end(label: str) -> str:
    """The end of a long label; the end of a path says more than its beginning."""
    return label if len(label) <= LONGEST_LABEL else f"{label[:2]}...{label[5 - LONGEST_LABEL :]}"


def aligned_values(
    labels: Sequence[str],
    tables: Sequence[Mapping[str, Mapping[str, float]]],
    measure: str,
) -> tuple[list[str], np.ndarray]:
    """One measure of each encoder, in the order of the first one's queries.

    Args:
        labels: what the encoders are called, for errors.
        tables: of each encoder, query id -> measure -> value.
        measure: such as `mrr@10`.

    Returns:
        The ids of the queries, and the values, `(n_encoders, n_queries) float64`.

    Raises:
        DataError: the queries differ, the measure is missing, or a value is no number.
    """
    ids = list(tables[0])
    for label, table in zip(labels, tables, strict=True):
        if table.keys() != tables[0].keys():
            only_there = len(table.keys() - tables[0].keys())
            raise DataError(
                f"{labels[0]} and {label} were measured on other queries: "
                f"{len(tables[0].keys() - table.keys())} of {len(ids)} are missing from the "
                f"latter, and {only_there} of {len(table)} from the former"
            )
        if without := next((query_id for query_id in ids if measure not in table[query_id]), None):
            measures = ", ".join(table[without]) or "none"
            raise DataError(f"{label} has no values of {measure}; it has: {measures}")
    values = np.array(
        [[table[query_id][measure] for query_id in ids] for table in tables], np.float64
    )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        worst = int(np.argmin(finite))
        count = int((~np.isfinite(values[worst])).sum())
        raise DataError(f"{count} values of {measure} of {labels[worst]} are not finite numbers")
    return ids, values


def changes_figure(titles: Sequence[str], changes: np.ndarray, measure: str) -> Figure:
    """A panel with one bar for the change of each query, sorted.

    Args:
        titles: of each panel.
        changes: `(n_panels, n_queries) float64`.
        measure: what has changed.
    """
    # half a second to import; drawn without pyplot, which keeps every figure in memory
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * len(titles)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(titles), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, title, change in zip(panels, titles, changes, strict=True):
        ordered = np.sort(change)[::-1]
        for colour, part in ((BETTER, ordered.clip(min=0)), (WORSE, ordered.clip(max=0))):
            # one outline of all bars: a patch for each takes seconds for thousands of queries
            panel.stairs(part, fill=True, color=colour)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=9, parse_math=False)
        panel.set_ylabel(f"change of {measure}")
    panels[-1].set_xlabel(f"{changes.shape[1]} queries, sorted by change")
    return figure
