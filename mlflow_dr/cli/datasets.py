"""`mlflow-dr datasets`."""

from __future__ import annotations

import click

from mlflow_dr.collection.catalogue import ENTRIES, all_formats


@click.command("datasets")
def command() -> None:
    """List the datasets that can be named.

    \b
    Example:
        mlflow-dr datasets
    """
    for entry in ENTRIES:
        click.echo(f"{entry.name:10}{entry.sizes}\n{'':10}from {entry.source}")
    for form in all_formats():
        click.echo(f"{form.pattern}\n{'':10}from {form.description}")
