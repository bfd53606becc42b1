"""The page of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from mlflow_dr import pages
from mlflow_dr.decisions.comparison import changes_figure
from mlflow_dr.report.contents import MEAN, ComparedQuery, Curve, RunReport
from mlflow_dr.report.figures import (
    FULL,
    curve_figure,
    lag_figure,
    overview_figure,
    shown_measure,
)
from mlflow_dr.terminal import time_span
from mlflow_dr.tracking.context import COMMAND_LINE_TAG
from mlflow_dr.tracking.runs import DATASET_PARAM
from mlflow_dr.tracking.validations import validation_collection

MS = 1000


def curve_section(report: RunReport) -> str:
    """The best checkpoint and the curve, as HTML for a notebook."""
    return "\n".join([*_summary(report), pages.picture(curve_figure(report))])


def report_page(report: RunReport) -> str:
    """One HTML page, without scripts and without other files."""
    sections = [
        *_summary(report),
        pages.heading("Curves"),
        pages.picture(overview_figure(report)),
        *_lead(report),
        *_checkpoints(report),
        pages.heading("Speed and lag"),
        pages.picture(lag_figure(report)),
        _speed(report),
        *_cost(report),
        *_how(report),
    ]
    return pages.page(f"Run {report.run.name}", sections)


def _summary(report: RunReport) -> Iterator[str]:
    """What was trained, on what it was validated, and how good the best checkpoint is."""
    state, best, measure = report.run.seen, report.best, shown_measure(report.metric.key)
    interval = report.curves[0].intervals.get(best.checkpoint.step, {}).get(report.metric.key)
    about = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    yield pages.paragraph(
        f"Best: step {best.checkpoint.step}, {measure} {best.first.value:.4f}{about}", kind="lead"
    )
    dataset = validation_collection(report.run, report.metric.validation)
    if report.curves[0].subset == MEAN:
        dataset = "several collections, their mean"
    model = state.data.params.get("model", "an encoder")
    trained_on = state.data.params.get(DATASET_PARAM)
    begun = f"Training of {model}" + (f" on {trained_on}" if trained_on else "")
    counts = report.states.get(report.metric.validation, {})
    done = ", ".join(f"{count} {name}" for name, count in counts.items())
    yield pages.paragraph(
        f"{begun}; run {report.run.id}, {state.info.status.lower()}.",
        f"Validation {report.metric.validation} on {dataset or 'an unknown collection'}; "
        f"checkpoints: {done}.",
    )


def _lead(report: RunReport) -> Iterator[str]:
    """The best checkpoint against the next one, query by query."""
    runner_up, measure = report.best.runner_up, shown_measure(report.metric.key)
    if runner_up is None:
        return
    best = report.best.first
    yield pages.heading("The best checkpoint against the next")
    yield pages.paragraph(
        f"Step {best.checkpoint.step} ({best.value:.4f}) against step "
        f"{runner_up.checkpoint.step} ({runner_up.value:.4f}): difference "
        f"{best.value - runner_up.value:+.4f}"
        + (f" over {report.change.queries} queries, {report.change}." if report.change else ".")
    )
    if not report.change:
        yield pages.paragraph("There are no values of single queries to test it.", kind="quiet")
        return
    if not report.changes.any():
        yield pages.paragraph("Both are as good on every query.")
        return
    title = f"step {best.checkpoint.step} less step {runner_up.checkpoint.step}"
    yield pages.picture(changes_figure([title], report.changes[None], measure))
    for name, queries in (("won", report.won), ("lost", report.lost)):
        if queries:
            yield pages.paragraph(f"Queries {name}, by the change of {measure}:")
            yield _query_table(queries, runner_up.checkpoint.step, best.checkpoint.step)


def _query_table(queries: Sequence[ComparedQuery], before: int, after: int) -> str:
    rows = [(query.query_id, query.text, query.before, query.after) for query in queries]
    return pages.table(("id", "query", f"step {before}", f"step {after}"), rows)


def _checkpoints(report: RunReport) -> Iterator[str]:
    yield pages.heading("All checkpoints")
    for curve in report.curves:
        about = "the full corpus" if curve.subset == FULL else curve.subset
        yield pages.paragraph(f"Validation {curve.name}: {about}")
        heads = ("step", *map(shown_measure, curve.measures), "seconds", "lag, s")
        rows = [
            (
                step,
                *(values.get(key) for key in curve.measures),
                *(_seconds(values.get(key)) for key in ("seconds", "lag_seconds")),
            )
            for step, values in zip(curve.steps, curve.values, strict=True)
        ]
        yield pages.table(heads, rows, marked=curve.best)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _speed(report: RunReport) -> str:
    heads = ("validation", "median seconds", "median passages/s", "median lag", "longest lag")
    return pages.table(heads, [_speed_row(curve) for curve in report.curves])


def _speed_row(curve: Curve) -> tuple[object, ...]:
    seconds, rates, lags = (
        curve.timings(key) for key in ("seconds", "passages_per_second", "lag_seconds")
    )
    return (
        curve.name,
        f"{median(seconds):.1f}" if seconds else None,
        f"{median(rates):,.0f}" if rates else None,
        time_span(median(lags)) if lags else None,
        time_span(max(lags)) if lags else None,
    )


def _cost(report: RunReport) -> Iterator[str]:
    """Time of training and of validating, and what the data loader did."""
    yield pages.heading("Cost")
    info = report.run.seen.info
    rows: list[tuple[str, str]] = []
    if (runtime := report.summary.get("runtime")) is not None:
        rows.append(("training", time_span(runtime)))
    if info.end_time and info.start_time:
        whole = time_span((info.end_time - info.start_time) / MS)
        rows.append(("the run, from beginning to end", whole))
    for curve in report.curves:
        if seconds := curve.timings("seconds"):
            what = f"validating {len(seconds)} checkpoints ({curve.name})"
            rows.append((what, time_span(sum(seconds))))
    yield pages.table(("what", "how much"), rows)
    if report.loading:
        yield pages.heading("How examples reached the training")
        shown = [(words, f"{value:,.3g}") for words, value in report.loading.items()]
        yield pages.table(("figure", "mean over the training"), shown)


def _how(report: RunReport) -> Iterator[str]:
    """How to get the best checkpoint, and how the run was made."""
    yield pages.heading("How to get it")
    yield pages.code(f"mlflow-dr best --run-id {report.run.id} --download best-encoder")
    data = report.run.seen.data
    if command := data.tags.get(COMMAND_LINE_TAG):
        yield pages.paragraph("The command of the run:")
        yield pages.code(command)
    rows = [
        (key, value)
        for key, value in sorted(data.params.items())
        if not key.startswith("mlflow_dr.")
    ]
    yield pages.heading("Parameters")
    yield pages.table(("parameter", "value"), rows)
