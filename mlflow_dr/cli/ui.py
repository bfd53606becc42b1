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
    help="The port of the pages.",
)
@tracking_uri
def command(port: int, tracking_uri: str | None) -> None:
    """Start MLflow's pages, and print the link to the curves of the latest run.

    Of a tracking server, which has its pages already, only the link is printed.

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
        free = next((one for one in range(port + 1, port + PORTS_TRIED) if _is_free(one)), None)
        other = free or "another number"
        raise click.ClickException(
            f"port {port} is taken: give --port {other} (make ui PORT={other})"
        )
    run = latest_run(client)
    click.echo(f"curves of {run.label}: {curves_url(run, base)}" if run else f"no run yet: {base}")
    if not is_server(uri):
        sys.stdout.flush()
        words = ["server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
        os.execv(sys.executable, [sys.executable, "-m", "mlflow", *words])


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError:
            return False
    return True
