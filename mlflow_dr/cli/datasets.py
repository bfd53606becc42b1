"""`mlflow-dr datasets`."""

from __future__ import annotations

import click

from mlflow_dr.collection.catalogue import ENTRIES, PATTERNS


@click.command("datasets")
def command() -> None:
    """List the collections that can be named.

    \b
    Example:
        mlflow-dr datasets
    """
    for name, sizes, source in (*(entry[:3] for entry in ENTRIES), *PATTERNS):
        click.echo(f"{name:10}{sizes}\n{'':10}from {source}")
