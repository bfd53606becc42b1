"""`mlflow-dr compare`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.validation.config import CompareConfig


@click.command("compare", cls=TakesSeveral)
@takes(CompareConfig)
def command(config: CompareConfig) -> None:
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
