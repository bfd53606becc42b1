"""What an evaluation found, as a terminal, a notebook and MLflow show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mlflow_dr import pages
from mlflow_dr.retrieval.estimate import Interval
from mlflow_dr.retrieval.measures import Measure
from mlflow_dr.retrieval.ranking import Ranking
from mlflow_dr.terminal import in_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        measures: measure -> mean over queries.
        per_query: query id -> measure -> value.
        ranking: query id -> (passage id, score).
        seconds: wall time of encoding, searching and measuring.
        passages: number of passages encoded.
        dtype: number format that was used.
        intervals: measure -> its mean and 95 % interval, if values are estimates; else empty.
        collections: of the mean of a suite that was evaluated now, the report of each collection.
        forms: of vectors of fewer dimensions or bits, the report by `64d`, `int8` or `64d-int8`.
    """

    measures: dict[Measure, float]
    per_query: dict[str, dict[Measure, float]]
    ranking: Ranking
    seconds: float
    passages: int
    dtype: str
    intervals: Mapping[Measure, Interval] = field(default_factory=dict)
    collections: Mapping[str, Report] = field(default_factory=dict)
    forms: Mapping[str, Report] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """A row for each query, or each collection of a suite; a column for each measure."""
        import pandas as pd

        rows = {name: report.measures for name, report in self.collections.items()}
        columns = list(self.measures)
        return pd.DataFrame.from_dict(rows or self.per_query, orient="index", columns=columns)

    def __repr__(self) -> str:
        if self.collections:
            rows = [(name, *map("{:.4f}".format, values)) for name, *values in self._suite_rows()]
            heads = ("collection", *map(str, self.measures))
            return f"{in_columns([heads, *rows])}\n{self._cost}"
        lines = [
            f"{name}\t{value:.4f}"
            + (f"\t95 % interval {low:.4f} to {high:.4f}" if low is not None else "")
            for name, value, low, high in self._measure_rows()
        ]
        return "\n".join([*lines, self._cost])

    @property
    def _cost(self) -> str:
        speed = f"{self.passages / self.seconds:.0f} a second, {self.dtype}"
        return f"{self.passages} passages in {self.seconds:.1f} s ({speed})"

    def _suite_rows(self) -> list[tuple[Any, ...]]:
        """A row for each collection of a suite and one for their mean, in each form of vectors."""
        return [
            (f"{name} {form}".rstrip(), *report.measures.values())
            for name, whole in {**self.collections, "mean": self}.items()
            for form, report in {"": whole, **whole.forms}.items()
        ]

    def _measure_rows(self) -> list[tuple[Any, ...]]:
        """A row for each measure in each form of vectors: its name, mean, and interval or None."""
        return [
            (f"{form} {name}".lstrip(), value, *report.intervals.get(name, (None,) * 3)[1:])
            for form, report in {"": self, **self.forms}.items()
            for name, value in report.measures.items()
        ]

    def _repr_html_(self) -> str:
        if self.collections:
            heads = ("collection", *map(str, self.measures))
            table = pages.table(heads, self._suite_rows())
            return f"{table}\n{pages.paragraph(self._cost, kind='quiet')}"
        rows = self._measure_rows()
        about = (
            f"{len(self.per_query)} queries; {self.passages} passages in {self.seconds:.1f} s, "
            f"{self.dtype}"
        )
        width = 4 if self.intervals else 2
        heads = ("measure", "mean", "low", "high")
        table = pages.table(heads[:width], [row[:width] for row in rows])
        return f"{table}\n{pages.paragraph(about, kind='quiet')}"


def mean_report(reports: Mapping[str, Report]) -> Report:
    """The means of a suite; each collection counts the same."""
    each = list(reports.values())
    measures = {
        measure: fmean(report.measures[measure] for report in each) for measure in each[0].measures
    }
    seconds = sum(report.seconds for report in each)
    passages = sum(report.passages for report in each)
    shared = [form for form in each[0].forms if all(form in report.forms for report in each)]
    return Report(
        measures,
        {},
        {},
        seconds,
        passages,
        each[0].dtype,
        collections=reports,
        forms={
            form: mean_report({name: report.forms[form] for name, report in reports.items()})
            for form in shared
        },
    )


def metric_values(report: Report) -> dict[str, float]:
    """The measures as MLflow names them, the ends of their intervals, of each form and collection.

    A collection's begin with its name and a form's with `64d`, such as `nq/64d/mrr_at_10`.
    """
    values = {measure.metric: value for measure, value in report.measures.items()}
    for measure, interval in report.intervals.items():
        values[f"{measure.metric}/low"] = interval.low
        values[f"{measure.metric}/high"] = interval.high
    for name, each in report.forms.items():
        values |= {f"{name}/{key}": value for key, value in metric_values(each).items()}
    for name, each in report.collections.items():
        values |= {f"{name}/{key}": value for key, value in metric_values(each).items()}
    return values
