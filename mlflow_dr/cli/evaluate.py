"""`mlflow-dr evaluate`, `compare` and `fidelity`: encoders measured once."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.validation.evaluate_config import CompareConfig, EvaluateConfig


@click.command("evaluate", cls=TakesSeveral)
@takes(EvaluateConfig)
def evaluate_command(config: EvaluateConfig) -> None:
    """Measure one encoder on a collection or a suite, without tracking.

    ENCODER is a directory (ours, sentence-transformers' or a bare backbone's), a hub name, or
    models:/<id> or models:/NAME@best for a published checkpoint. Under `mlflow run` the report is
    logged to the run, too.

    \b
    Example:
        mlflow-dr evaluate my-encoder --dataset irds:vaswani --measures "ndcg@10 recall@100"
        mlflow-dr evaluate my-encoder --dataset nanobeir --measures ndcg@10
    """
    from mlflow_dr.validation.evaluate import evaluate_encoder

    click.echo(evaluate_encoder(config, find_project_run(config.tracking_uri)))


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
    """Find the subset or small collection that chooses the right checkpoint in the least time.

    Each checkpoint is measured on the full corpus and, from the same vectors, on every subset, and
    on each collection of --against. The report shows for each its passages and seconds, Kendall's
    tau and Pearson with the full corpus, the regret of its best checkpoint and how much higher its
    values are, with intervals over queries. It says which one to validate on. If the study is
    stopped, start it again: what is measured is kept.

    \b
    Example:
        mlflow-dr fidelity --run-id 0123456789abcdef0123456789abcdef \\
            --subset random:1000 bm25@10 bm25@50 bm25@10+random:1000
        mlflow-dr fidelity --checkpoints-dir output --dataset path/to/beir \\
            --subset ranking:bm25.run@20 encoder:path/to/model@20 --output study
        mlflow-dr fidelity --run-id RUN --dataset mteb/scifact --against zeta-alpha-ai/NanoSciFact
    """
    config.check_source()  # before seconds of imports
    from mlflow_dr.fidelity_study.report import report_text
    from mlflow_dr.fidelity_study.run_study import fidelity

    click.echo(report_text(fidelity(config)))
