"""`mlflow-dr compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_dr.cli.options import device, dtype, seed, tracking_uri


@click.command("compare")
@click.argument("operands", nargs=-1, required=True)
@click.option(
    "--name", default="val", show_default=True, help="The validation whose values are taken."
)
@click.option("--measure", help="What is compared (default: the validation's first measure).")
@click.option(
    "--dataset",
    help="demo, msmarco, a folder, or irds:<id>: evaluate on it now what has no values, and show "
    "the texts of its queries.",
)
@click.option("--split", help="The queries to put (default: the validation's, else dev or test).")
@device
@dtype
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the values of all queries (CSV) and a picture of the differences to this folder.",
)
@click.option("--force", is_flag=True, help="Replace these files if they are there.")
@click.option(
    "--q-max-len",
    "--q_max_len",
    type=click.IntRange(min=3),
    help="Tokens of a query, for encoders that are evaluated now (default: their own).",
)
@click.option(
    "--p-max-len",
    "--p_max_len",
    type=click.IntRange(min=3),
    help="Tokens of a passage, for encoders that are evaluated now (default: their own).",
)
@click.option(
    "--changed",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="How many of the queries that changed most are shown.",
)
@click.option("--trust-remote-code", is_flag=True, help="Let code in an encoder's directory run.")
@seed
@tracking_uri
def command(changed: int, **options: Any) -> None:
    """Compare two or more encoders with the first of them, query by query.

    OPERANDS are runs by id or name (their best checkpoints), RUN@STEP, models:/..., or encoders by
    directory or hub name, which need --dataset. Shown are means, the difference with a 95 %
    bootstrap interval, the p-value of the paired randomisation test (of several by Holm's rule,
    too), and the queries that changed most.

    \b
    Example:
        mlflow-dr compare 0123456789abcdef0123456789abcdef my-encoder --dataset msmarco
    """
    from mlflow_dr.decisions.comparison import comparison_text
    from mlflow_dr.validation.compare import Comparing, compare

    click.echo(comparison_text(compare(Comparing(**options)), changed))
