"""`mlflow-dr ui`."""

from __future__ import annotations

import os
import socket
import sys

import click

from mlflow_dr.cli.options import tracking_uri

HOST = "127.0.0.1"
PORTS_TRIED = 20


@click.command("ui")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="Port of MLflow's web pages.",
)
@tracking_uri
def command(port: int, tracking_uri: str | None) -> None:
    """Start MLflow's web pages, and print the link to the curves of the latest run.

    If a tracking server is running, it already has these pages, and only the link is printed.

    \b
    Example:
        mlflow-dr ui --port 5001
    """
    from mlflow_dr.tracking.client import connect, is_server
    from mlflow_dr.tracking.client import tracking_uri as chosen_uri
    from mlflow_dr.tracking.status import curves_url, latest_run

    client = connect(tracking_uri, may_create=False)
    uri = chosen_uri()
    base = uri if is_server(uri) else f"http://{HOST}:{port}"
    if not is_server(uri) and not _is_free(port):
        others = range(port + 1, port + PORTS_TRIED)
        other = next((other for other in others if _is_free(other)), None) or "another number"
        raise click.ClickException(
            f"port {port} is taken; pass --port {other} (make ui PORT={other})"
        )
    run = latest_run(client)
    click.echo(f"curves of {run.label}: {curves_url(run, base)}" if run else f"no run yet: {base}")
    if not is_server(uri):
        sys.stdout.flush()
        argv = ["server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
        os.execv(sys.executable, [sys.executable, "-m", "mlflow", *argv])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
