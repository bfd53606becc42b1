"""A study of fidelity in words, as a table, and in files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.fidelity.agreement import FIGURES, Curve, Estimate, FidelityResult, StudiedSubset
from mlflow_dr.fidelity.pictures import draw_curves, draw_time_against_fidelity
from mlflow_dr.files import atomic_write
from mlflow_dr.terminal import in_columns

REPORT, TABLE, VALUES = "report.txt", "table.csv", "values.parquet"
CURVES, TIME = "curves.png", "time_against_fidelity.png"
SIZES = ("subset", "passages", "queries", "seconds")
HEADS = (*SIZES, "Kendall's tau", "Pearson", "regret", "inflation", "chooses")
FORMATS = {"tau": ".3f", "pearson": ".3f", "regret": ".4f", "inflation": "+.4f"}
MARK, REFINE = "*", "`--refine full@3`"


def report_text(findings: FidelityResult) -> str:
    """The table, the checkpoints that were skipped, and the recommendation."""
    n_queries = len(findings.full.query_ids)
    lines = [
        f"{findings.measure} of {len(findings.steps)} checkpoints (steps {findings.steps[0]} to "
        f"{findings.steps[-1]}) of {n_queries} queries of {findings.collection}/{findings.split}, "
        "with 95 % intervals over queries",
        "",
        in_columns(_rows(findings)),
        "",
    ]
    if findings.skipped:
        lines.append(f"checkpoints passed over: {len(findings.skipped)}")
        lines += [f"  step {step}: {reason}" for step, reason in findings.skipped.items()]
        lines.append("")
    return "\n".join([*lines, recommendation(findings)])


def recommendation(findings: FidelityResult) -> str:
    """Which subset to validate on, in words."""
    best, measure = findings.recommended, findings.measure
    if findings.spread.is_flat:
        return (
            f"No order can be told: on the full corpus the checkpoints differ by "
            f"{findings.spread.observed:.4f} {measure}, and were they all equally good, other "
            f"queries would make up to {findings.spread.by_chance:.4f} of it. Study checkpoints "
            "that lie further apart, or more queries."
        )
    if best is not None:
        return _praise(findings, best)
    if findings.trusted:
        names = ", ".join(subset.curve.name for subset in findings.trusted)
        return f"The full corpus: {names} can be trusted, but none of them is faster."
    closest = max(
        findings.subsets,
        key=lambda subset: (np.nan_to_num(subset.agreement.tau.value), -subset.share),
    )
    return (
        f"None of these subsets can be trusted: none chooses a checkpoint within "
        f"{findings.tolerance:g} {measure} of the best and orders them better than chance would. "
        f"Let the full corpus decide among the best that {closest.curve.name} finds ({REFINE} of "
        "`mlflow-dr validate`), or study larger subsets."
    )


def write_files(findings: FidelityResult, directory: Path) -> list[Path]:
    """Write the report, the table, the values of all queries, and two pictures.

    Args:
        findings: what was found.
        directory: is made if it is new.

    Returns:
        The files.
    """
    writers = {
        REPORT: lambda path: path.write_text(report_text(findings) + "\n", encoding="utf-8"),
        TABLE: lambda path: _write_table(findings, path),
        VALUES: lambda path: pq.write_table(values_table(findings), path, compression="zstd"),
        CURVES: lambda path: draw_curves(findings, path),
        TIME: lambda path: draw_time_against_fidelity(findings, path),
    }
    for name, write in writers.items():
        with atomic_write(directory / name) as partial:
            write(partial)
    return [directory / name for name in writers]


def fidelity_metrics(findings: FidelityResult) -> dict[str, float]:
    """The figures that are defined, named as MLflow allows: `fidelity/bm25_at_50/tau`."""
    full = findings.full
    metrics = {"fidelity/full/seconds": full.seconds, "fidelity/full/passages": full.passages}
    for subset in findings.subsets:
        figures = {name: _estimate(subset, name).value for name in FIGURES}
        figures |= {"seconds": subset.curve.seconds, "passages": subset.curve.passages}
        metrics |= {
            f"fidelity/{subset.curve.slug}/{name}": value
            for name, value in figures.items()
            if not np.isnan(value)
        }
    return metrics


def values_table(findings: FidelityResult) -> pa.Table:
    """The values of all queries: columns `strategy`, `step`, `query_id` and `value`."""
    curves = [findings.full, *(subset.curve for subset in findings.subsets)]
    return pa.concat_tables(_values(findings.steps, curve) for curve in curves).combine_chunks()


def _values(steps: tuple[int, ...], curve: Curve) -> pa.Table:
    n_queries = len(curve.query_ids)
    return pa.table(
        {
            "strategy": pa.array([curve.name] * curve.values.size),
            "step": pa.array(np.repeat(np.array(steps, np.int64), n_queries)),
            "query_id": pa.array(list(curve.query_ids) * len(steps)),
            "value": pa.array(curve.values.ravel()),
        }
    )


def _rows(findings: FidelityResult) -> list[tuple[str, ...]]:
    """Two lines for each subset: its figures, and their intervals below."""
    full, best = findings.full, findings.recommended
    rows = [HEADS, (*_size(full), *("-" for _ in FIGURES), f"step {findings.steps[full.best]}")]
    for subset in findings.subsets:
        estimates = [(_estimate(subset, name), FORMATS[name]) for name in FIGURES]
        figures = [format(x.value, form) if x.is_defined else "-" for x, form in estimates]
        intervals = [_interval(x, form) for x, form in estimates]
        mark = f" {MARK}" if subset is best else ""
        rows.append(
            (*_size(subset.curve), *figures, f"step {findings.steps[subset.curve.best]}{mark}")
        )
        rows.append(("", "", "", "", *intervals, ""))
    return rows


def _size(curve: Curve) -> tuple[str, ...]:
    sizes = (str(curve.passages), str(len(curve.query_ids)))
    return curve.name, *sizes, f"{curve.seconds:.2f}"


def _interval(estimate: Estimate, form: str) -> str:
    ends = (estimate.low, estimate.high)
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if estimate.has_interval else ""


def _estimate(compared: StudiedSubset, name: str) -> Estimate:
    estimate: Estimate = getattr(compared.agreement, name)
    return estimate


def _praise(findings: FidelityResult, best: StudiedSubset) -> str:
    curve, figures, measure = best.curve, best.agreement, findings.measure
    chosen, wanted = findings.steps[curve.best], findings.steps[findings.full.best]
    right = "as the full corpus does" if chosen == wanted else f"the full corpus step {wanted}"
    text = (
        f"Validate on {curve.name}: {best.share:.0%} of the full corpus's time ({curve.seconds:.2f}"
        f" s instead of {findings.full.seconds:.2f} s a checkpoint). It chooses step {chosen}, "
        f"{right} (regret {figures.regret.value:.4f} {measure}), and orders the checkpoints with "
        f"tau {figures.tau.value:.3f}. "
    )
    if figures.regret.high > findings.tolerance:
        text += (
            f"On other queries the regret might be {figures.regret.high:.4f}, more than the "
            f"tolerance of {findings.tolerance:g}: {REFINE} lets the full corpus decide among the "
            "best. "
        )
    return (
        f"{text}Its values differ by {figures.inflation.value:+.4f} from the full corpus's: "
        "compare them with each other only."
    )


def _write_table(findings: FidelityResult, path: Path) -> None:
    """The table with its numbers as they are; what is undefined is left empty."""
    heads = ["subset", "passages", "queries", "seconds", "share_of_seconds"]
    heads += [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*heads, "chosen_step", "recommended"])
        for curve, subset in (
            (findings.full, None),
            *((subset.curve, subset) for subset in findings.subsets),
        ):
            figures: list[float] = (
                [] if subset is None else [x for e in subset.agreement for x in e]
            )
            shown = ["" if np.isnan(value) else value for value in figures] or [""] * 12
            share = 1.0 if subset is None else subset.share
            sizes = [curve.name, curve.passages, len(curve.query_ids), curve.seconds, share]
            chosen = findings.steps[curve.best]
            is_best = subset is not None and subset is findings.recommended
            rows.writerow([*sizes, *shown, chosen, "yes" if is_best else ""])
