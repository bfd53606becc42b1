"""`mlflow-dr evaluate`, `compare` and `fidelity`: encoders measured once."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.fidelity.config import FidelityConfig
from mlflow_dr.validation.config import CompareConfig, EvaluateConfig


@click.command("evaluate", cls=TakesSeveral)
@takes(EvaluateConfig)
def evaluate_command(config: EvaluateConfig) -> None:
    """Measure one encoder on one collection, without tracking.

    ENCODER is a directory (ours, sentence-transformers' or a bare backbone's), a hub name, or
    models:/<id> or models:/NAME@best for a published checkpoint. Under `mlflow run` the report is
    logged to the run, too.

    \b
    Example:
        mlflow-dr evaluate my-encoder --dataset irds:vaswani --measures "ndcg@10 recall@100"
    """
    from mlflow_dr.validation.evaluate import evaluate_encoder

    report = evaluate_encoder(config, find_project_run(config.tracking_uri))
    for name, value in report.measures.items():
        interval = report.intervals.get(name)
        ends = f"\t95 % interval {interval.low:.4f} to {interval.high:.4f}" if interval else ""
        click.echo(f"{name}\t{value:.4f}{ends}")
    click.echo(
        f"{report.passages} passages in {report.seconds:.1f} s "
        f"({report.passages / report.seconds:.0f} a second, {report.dtype})"
    )


@click.command("compare", cls=TakesSeveral)
@takes(CompareConfig)
def compare_command(config: CompareConfig) -> None:
    """Compare two or more encoders with the first of them, query by query.

    OPERANDS are runs by id or name (their best checkpoints), RUN@STEP, models:/..., or encoders by
    directory or hub name, which need --dataset. Shown are means, the difference with a 95 %
    bootstrap interval, the p-value of the paired randomisation test (of several encoders also by
    Holm's rule), and the queries that changed most.

    \b
    Example:
        mlflow-dr compare 0123456789abcdef0123456789abcdef my-encoder --dataset msmarco
    """
    from mlflow_dr.decisions.comparison import comparison_text
    from mlflow_dr.validation.compare import compare

    click.echo(comparison_text(compare(config), config.changed))


@click.command("fidelity", cls=TakesSeveral)
@takes(FidelityConfig)
def fidelity_command(config: FidelityConfig) -> None:
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
    if not (config.run_id or config.checkpoints_dir):
        raise click.UsageError("give --run-id or --checkpoints-dir")
    dataset, splits = config.named_dataset()
    if not (config.run_id or dataset):
        raise click.UsageError("without a run, give --dataset")
    if dataset and splits:
        config.one_dataset(config.split)

    from mlflow_dr.fidelity.report import report_text, write_files
    from mlflow_dr.fidelity.study import study_fidelity
    from mlflow_dr.files import scratch
    from mlflow_dr.tracking.artifacts import FIDELITY_FOLDER, log_study
    from mlflow_dr.tracking.checkpoints import run_checkpoints
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.following import found_checkpoints
    from mlflow_dr.tracking.runs import resolve_run

    client = connect(config.tracking_uri, may_create=False) if config.run_id else None
    run = resolve_run(client, config.run_id) if client and config.run_id else None
    if config.checkpoints_dir is not None:
        checkpoints = found_checkpoints(config.checkpoints_dir)
    else:
        checkpoints = (
            [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready] if run else []
        )
    result = study_fidelity(checkpoints, config, run)
    click.echo(report_text(result))
    if config.output is not None:
        write_files(result, config.output)
    if run is not None and not config.no_log:
        with scratch() as directory:
            log_study(run, write_files(result, directory), FIDELITY_FOLDER)
