"""`mlflow-dr fidelity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_dr.cli.options import (
    RUN,
    Finite,
    TakesSeveral,
    check_one_set,
    checkpoints_dir,
    device,
    dtype,
    encoder_changes,
    encoder_options,
    every,
    file_options,
    given_dataset,
    keep_own_id,
    subset_options,
    tracking_uri,
)
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES


@click.command("fidelity", cls=TakesSeveral)
@click.option("--run-id", help=RUN)
@checkpoints_dir()
@click.option("--dataset", help="The collection (default: the run's).")
@file_options
@click.option(
    "--split",
    help="The queries to put (default: the run's on its own collection, else dev, else test).",
)
@subset_options
@click.option(
    "--measure",
    default=DEFAULT_MEASURES.split()[0],
    show_default=True,
    help="What orders the checkpoints: mrr, ndcg, recall, map, precision or success, @k.",
)
@device
@dtype
@keep_own_id
@encoder_options
@click.option("--steps", multiple=True, type=int, help="Only the checkpoints of these steps.")
@every
@click.option(
    "--tolerance",
    type=Finite(min=0),
    default=0.005,
    show_default=True,
    help="How much worse than the best a subset's choice may be.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Of the queries, for the intervals.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for the report, the table, the values of all queries and two pictures.",
)
@click.option("--no-log", is_flag=True, help="Write nothing to the run.")
@tracking_uri
def command(
    run_id: str | None,
    checkpoints_dir: Path | None,
    dataset: str | None,
    candidate_dir: Path | None,
    query_files: tuple[Path, ...],
    qrel_files: tuple[Path, ...],
    output: Path | None,
    no_log: bool,
    tracking_uri: str | None,
    **options: Any,
) -> None:
    """Find the subset of the corpus that chooses the right checkpoint in the least time.

    Each checkpoint is measured on the full corpus and, from the same vectors, on every subset. For
    each subset: passages, seconds, Kendall's tau and Pearson with the full corpus, the regret of
    its best checkpoint and how much higher its values are, with intervals over queries; and which
    subset to validate on. Stop it and start it again: what is measured is kept.

    \b
    Example:
        mlflow-dr fidelity --run-id 0123456789abcdef0123456789abcdef \\
            --subset random:1000 bm25@10 bm25@50 bm25@10+random:1000
        mlflow-dr fidelity --checkpoints-dir output --dataset path/to/beir \\
            --subset ranking:bm25.run@20 encoder:path/to/model@20 --output study
    """
    if not (run_id or checkpoints_dir):
        raise click.UsageError("give --run-id or --checkpoints-dir")
    dataset, sets = given_dataset(dataset, candidate_dir, query_files, qrel_files)
    if not (run_id or dataset):
        raise click.UsageError("without a run, give --dataset")
    check_one_set(sets, options["split"])
    asked = _asked(dataset, options["split"] or next(iter(sets), None), options)

    from mlflow_dr.fidelity.report import fidelity_metrics, report_text, write_files
    from mlflow_dr.fidelity.study import study_fidelity
    from mlflow_dr.files import scratch
    from mlflow_dr.tracking.artifacts import log_study
    from mlflow_dr.tracking.checkpoints import run_checkpoints
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.directories import found_checkpoints
    from mlflow_dr.tracking.runs import resolve_run

    client = connect(tracking_uri, may_create=False) if run_id else None
    run = resolve_run(client, run_id) if client and run_id else None
    if checkpoints_dir is not None:
        checkpoints = found_checkpoints(checkpoints_dir)
    else:
        checkpoints = [one for one in run_checkpoints(run) if one.ready] if run else []
    findings = study_fidelity(checkpoints, asked, run)
    click.echo(report_text(findings))
    if output is not None:
        write_files(findings, output)
    if run is not None and not no_log:
        with scratch() as room:
            log_study(run, fidelity_metrics(findings), write_files(findings, room))


def _asked(dataset: str | None, split: str | None, options: dict[str, Any]) -> Any:
    from mlflow_dr.fidelity.study import FidelityConfig
    from mlflow_dr.retrieval.measures import parse_measures
    from mlflow_dr.subsets.spec import parse_subset

    measures = parse_measures(options["measure"])
    if len(measures) > 1:
        raise click.UsageError(f"one --measure orders the checkpoints, not {len(measures)}")
    return FidelityConfig(
        tuple(parse_subset(one, options["seed"], options["judged"]) for one in options["subsets"]),
        measures[0],
        dataset,
        split,
        device=options["device"],
        dtype=options["dtype"],
        keep_own_id=options["keep_own_id"],
        encoder_changes=encoder_changes(options),
        steps=options["steps"],
        every=options["every"],
        tolerance=options["tolerance"],
        resamples=options["resamples"],
    )
