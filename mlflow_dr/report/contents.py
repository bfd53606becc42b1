"""What a report says about a run, read from the tracking server."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlflow_dr.decisions.best import Best, against_runner_up, find_best
from mlflow_dr.decisions.significance import Difference, mean_interval
from mlflow_dr.errors import DataError, NoValuesError, UsageError
from mlflow_dr.retrieval.measures import recorded_measures
from mlflow_dr.tracking.artifacts import per_query_values, stored_query_texts
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.results import TIMINGS, State, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import (
    Metric,
    chosen_metric,
    recorded_values,
    run_validations,
    sign_of,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

MOST_INTERVALS = 200  # checkpoints of a curve
MEAN = "mean"
MOST_QUERIES = 10  # that are shown as won, and as lost
SUMMARY_TAG = "mlflow_dr.training_summary"
LOADING = {
    "data/wait_fraction": "share of the time in which training waited for the data loader",
    "data/samples_per_second": "examples per second",
    "data/padding_fraction": "share of padding in the batches",
    "data/memory_private_mb": "private memory of training, MB",
}

Table = Mapping[str, Mapping[str, float]]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The figures of one validation.

    Attributes:
        name: of the validation.
        subset: the passages that are searched; `full` is the whole corpus, and `mean` says that it
            is the mean of a suite.
        measures: keys of its measures, such as `mrr_at_10`.
        checkpoints: that have figures, by step.
        values: of each checkpoint, by measure; timings too.
        intervals: step -> measure -> 95 % interval over queries, where it is known.
        best: the index of the best checkpoint by the first measure.
    """

    name: str
    subset: str
    measures: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    values: tuple[Mapping[str, float], ...]
    intervals: Mapping[int, Mapping[str, Interval]]
    best: int

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints."""
        return [checkpoint.step for checkpoint in self.checkpoints]

    def timings(self, key: str) -> list[float]:
        """The values of a timing, of the checkpoints that have it."""
        return [values[key] for values in self.values if key in values]


class ComparedQuery(NamedTuple):
    """A query whose value differs between the best checkpoint and the next."""

    query_id: str
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class RunReport:
    """What a report says.

    Attributes:
        run: as it was fetched for the report.
        metric: decides which checkpoint is best.
        best: the best checkpoint and the next.
        change: the best one's lead; None without values of single queries.
        won: queries on which the best is ahead, the most first.
        lost: queries on which it is behind, the most first.
        changes: of all queries, `(n_queries,) float64`; empty without values.
        curves: of the run's validations; that of the metric first.
        states: how many checkpoints are in each state, by validation.
        losses: step and training loss.
        loading: figures of the data loader, in words, on average.
        summary: figures of the whole training.
    """

    run: TrackedRun
    metric: Metric
    best: Best
    change: Difference | None
    won: Sequence[ComparedQuery]
    lost: Sequence[ComparedQuery]
    changes: np.ndarray
    curves: Sequence[Curve]
    states: Mapping[str, Mapping[str, int]]
    losses: Sequence[tuple[int, float]]
    loading: Mapping[str, float]
    summary: Mapping[str, float]

    def frame(self) -> pd.DataFrame:
        """A row for each validation and checkpoint: its step, its figures and timings."""
        import pandas as pd

        return pd.DataFrame(
            {"validation": curve.name, "step": step, **values}
            for curve in self.curves
            for step, values in zip(curve.steps, curve.values, strict=True)
        )

    def __repr__(self) -> str:
        return f"{len(self.curves[0].steps)} checkpoints of run {self.run.name}; best: {self.best}"

    def _repr_html_(self) -> str:
        from mlflow_dr.report.page import curve_section

        return curve_section(self)


def read_report(run: TrackedRun, metric: str | None = None) -> RunReport:
    """Read what a report of a run says.

    Args:
        run: which.
        metric: decides which checkpoint is best, as `find_best` takes it.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: no checkpoint has a value of it, or the server does not answer.
    """
    chosen = chosen_metric(run, metric)
    best = find_best(run, chosen)
    checkpoints = run_checkpoints(run)
    configs = run_validations(run)
    names = sorted(configs, key=lambda name: (name != chosen.validation, name))
    curves = [
        curve
        for name in names
        if (curve := _curve(run, name, configs[name], checkpoints, chosen)) is not None
    ]
    changes, won, lost = _queries(run, best)
    try:
        change = against_runner_up(run, best)
    except (NoValuesError, DataError):
        change = None
    return RunReport(
        run=run,
        metric=chosen,
        best=best,
        change=change,
        won=won,
        lost=lost,
        changes=changes,
        curves=curves,
        states={name: _states(checkpoints, name) for name in names},
        losses=training_losses(run),
        loading=_loading(run),
        summary=_summary(run.seen.data.tags.get(SUMMARY_TAG, "")),
    )


def _curve(
    run: TrackedRun,
    name: str,
    config: Mapping[str, object],
    checkpoints: Sequence[Checkpoint],
    chosen: Metric,
) -> Curve | None:
    """The curve of a validation; None if it has no figures."""
    found = [
        (checkpoint, values)
        for checkpoint in checkpoints
        if (values := recorded_values(checkpoint, name))
    ]
    if not found:
        return None
    measures = [key for key in found[0][1] if key not in TIMINGS]
    if name == chosen.validation:
        measures.sort(key=lambda key: key != chosen.key)
    first = measures[0]
    worst = -math.inf
    ranks = [
        sign_of(first) * values[first] if math.isfinite(values.get(first, worst)) else worst
        for _, values in found
    ]
    best = ranks.index(max(ranks))
    ends = {0, best, len(found) - 1}
    intervals: dict[int, Mapping[str, Interval]] = {}
    for index, (checkpoint, _) in enumerate(found):
        if index in ends or len(found) <= MOST_INTERVALS:
            keys = measures if index in ends else measures[:1]
            intervals[checkpoint.step] = _intervals(run, checkpoint, name, keys)
    return Curve(
        name,
        MEAN if "mean_of" in config else str(config.get("subset", "full")),
        tuple(measures),
        tuple(checkpoint for checkpoint, _ in found),
        tuple(values for _, values in found),
        intervals,
        best,
    )


def _intervals(
    run: TrackedRun, checkpoint: Checkpoint, name: str, keys: Sequence[str]
) -> dict[str, Interval]:
    """The intervals of these measures; empty without values of single queries."""
    try:
        table = per_query_values(run, checkpoint, name)
    except (NoValuesError, DataError) as error:
        log.debug("no intervals of step %d: %s", checkpoint.step, error)
        return {}
    intervals: dict[str, Interval] = {}
    for key in keys:
        values = _column(table, key)
        if len(values) and np.isfinite(values).all():
            intervals[key] = mean_interval(values)
    return intervals


def _column(table: Table, key: str) -> np.ndarray:
    """The values of a measure; empty if the table has other measures."""
    try:
        (measure,) = recorded_measures(key)
    except UsageError:  # a reader's
        return np.zeros(0)
    rows = [values.get(str(measure)) for values in table.values()]
    return np.array([value for value in rows if value is not None], np.float64)


def _queries(
    run: TrackedRun, best: Best
) -> tuple[np.ndarray, list[ComparedQuery], list[ComparedQuery]]:
    """The change of each query from the runner-up to the best, and those that changed most."""
    if best.runner_up is None:
        return np.zeros(0), [], []
    read = partial(per_query_values, run, name=best.metric.validation)
    try:
        before, after = read(best.runner_up.checkpoint), read(best.checkpoint)
    except (NoValuesError, DataError):
        return np.zeros(0), [], []
    measure = str(*recorded_measures(best.metric.key))
    texts = stored_query_texts(run, best.checkpoint, best.metric.validation)
    queries = [
        ComparedQuery(query_id, texts.get(query_id, ""), before[query_id][measure], values[measure])
        for query_id, values in after.items()
        if measure in values and measure in before.get(query_id, {})
    ]
    sign = best.metric.sign
    changed = sorted(queries, key=lambda query: sign * (query.before - query.after))
    won = [query for query in changed if sign * (query.after - query.before) > 0]
    lost = [query for query in reversed(changed) if sign * (query.after - query.before) < 0]
    changes = np.array([query.after - query.before for query in queries], np.float64)
    return changes, won[:MOST_QUERIES], lost[:MOST_QUERIES]


def _states(checkpoints: Sequence[Checkpoint], name: str) -> dict[str, int]:
    states = [validation_state(checkpoint, name) for checkpoint in checkpoints if checkpoint.ready]
    return {state.value: states.count(state) for state in State if state in states}


def training_losses(run: TrackedRun) -> list[tuple[int, float]]:
    """The loss of each step that has one."""
    return _history(run, "train/loss")


def _history(run: TrackedRun, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in run.metric_history(metric))


def _loading(run: TrackedRun) -> dict[str, float]:
    means = {}
    for metric, words in LOADING.items():
        if metric in run.seen.data.metrics and (points := _history(run, metric)):
            means[words] = float(np.mean([value for _, value in points]))
    return means


def _summary(tag: str) -> dict[str, float]:
    try:
        values: Any = json.loads(tag or "{}")
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
