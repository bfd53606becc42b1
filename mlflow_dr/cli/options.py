"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mlflow_dr.retrieval.measures import DEFAULT_MEASURES

measures = click.option(
    "--measures",
    default=DEFAULT_MEASURES,
    show_default=True,
    help="What to measure: mrr, ndcg, recall, map, precision, success or accuracy, each @k.",
)
depth = click.option(
    "--depth",
    type=click.IntRange(min=1),
    help="Passages to rank for each query (default: the largest cut-off of the measures).",
)
device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<n>."
)
dtype = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto (bf16 where the hardware multiplies it, else fp32), fp32, bf16 or fp16.",
)
keep_own_id = click.option(
    "--keep-own-id",
    is_flag=True,
    help="Keep a passage whose id is the query's id (BEIR's convention leaves it out).",
)
tracking_uri = click.option(
    "--tracking-uri", help="The tracking server (default: MLFLOW_TRACKING_URI)."
)


def evaluation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Measures, depth, device, dtype and keep-own-id."""
    for option in (keep_own_id, dtype, device, depth, measures):
        function = option(function)
    return function
