"""The traffic of several validators, and how soon they claim a checkpoint.

    python -m benchmarks.validators

A real MLflow server on loopback; checkpoints are a few bytes, and evaluating one is a wait of a
second. The rest is traffic: polls, claims, heartbeats, downloads, records, metrics.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import click
from mlflow import MlflowClient
from requests import Session

from benchmarks.machine import machine
from benchmarks.server import Server
from mlflow_dr.background import BackgroundTask
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking import fetching, prefetch
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import mark_failed
from mlflow_dr.tracking.runs import TrackedRun, find_run
from mlflow_dr.validation import encoders
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validator import run_validator

COLLECTION = Path(__file__).parents[1] / "examples" / "sea"
(MEASURE,) = parse_measures("mrr@10")
VALIDATION = {"measures": "mrr@10", "device": "cpu", "dtype": "fp32"}
POLLS = 20
SLOW = 3.0
SECONDS_TO_BEGIN = 3.0


def new_run(client: MlflowClient) -> TrackedRun:
    run = TrackedRun(client, client.create_run("0"))
    run.log_params({"dataset": open_collection(str(COLLECTION)).name, "validation_split": "dev"})
    return run


def published(run: TrackedRun, steps: Sequence[int], directory: Path) -> None:
    for step in steps:
        publish(run, directory, step)


def waiting(seconds: float) -> Callable[..., list[Report]]:
    """An evaluation that waits and gives the same figures for all checkpoints."""

    def evaluate_all(encoder: object, asked: Sequence[Any], *_: object) -> list[Report]:
        time.sleep(seconds)
        per_query = {f"q{number}": {MEASURE: 0.5} for number in range(24)}
        return [
            Report({MEASURE: 0.5}, per_query, {}, max(seconds, 0.001), 24, "fp32") for _ in asked
        ]

    return evaluate_all


def cost_of_a_poll(client: MlflowClient, directory: Path, count: int) -> tuple[int, float]:
    """Requests and milliseconds of polling a run that has `count` finished checkpoints."""
    run = new_run(client)
    published(run, range(count), directory)
    followed = FollowedRun(run)
    for checkpoint in followed.snapshot().checkpoints:
        mark_failed(run, checkpoint, "val", "no encoder")
        followed.checkpoints.mark_done(checkpoint)
    followed.snapshot()
    times: list[float] = []
    with mock.patch("mlflow.utils.rest_utils.http_request", wraps=_http_request()) as requests:
        for _ in range(POLLS):
            start = time.perf_counter()
            followed.snapshot()
            times.append(time.perf_counter() - start)
        calls = requests.call_count // POLLS
    return calls, 1000 * statistics.median(times)


def _http_request() -> Callable[..., Any]:
    from mlflow.utils import rest_utils

    return rest_utils.http_request


def begun_after(client: MlflowClient, directory: Path, poll_seconds: float, count: int) -> float:
    """The longest time from READY until a waiting validator claims a checkpoint, in s."""
    run = new_run(client)
    seconds: list[float] = []
    real = Claims.claim

    def claim(self: Any, checkpoint: Any, name: str) -> bool:
        won = real(self, checkpoint, name)
        seconds.append(time.time() - checkpoint.ready_ms / 1000)
        return won

    with mock.patch.object(Claims, "claim", claim):
        thread = threading.Thread(
            target=run_validator,
            args=(FollowedRun(run), ValidateConfig(**VALIDATION, poll_seconds=poll_seconds)),
        )
        thread.start()
        time.sleep(2)
        for step in range(count):
            publish(run, directory, step)
            time.sleep(1.3 * poll_seconds)
        client.set_terminated(run.id)
        thread.join()
    assert len(seconds) == count
    return max(seconds)


class Traffic:
    """Seconds that threads wait for requests, downloads and writes."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._inside = threading.local()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Count the time of the function; nested calls are counted only once."""

        @wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            if getattr(self._inside, "counting", False):
                return function(*args, **options)
            self._inside.counting, start = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._inside.counting = False
                spent, me = time.perf_counter() - start, threading.get_ident()
                self.seconds[me] = self.seconds.get(me, 0.0) + spent

        return wrapped


def share_of_traffic(
    client: MlflowClient, directory: Path, count: int, validators: int, seconds: float
) -> tuple[float, float, int]:
    """The share of the validators' time that is traffic, and the share that is not evaluation.

    The second includes starting, and waiting for the last of the others at the end.

    Returns:
        Both shares, and the number of evaluations that were done twice.
    """
    run = new_run(client)
    published(run, range(count), directory)
    client.set_terminated(run.id)
    traffic = Traffic()
    results: list[tuple[float, int, float]] = []

    def work() -> None:
        start = time.perf_counter()
        done = run_validator(FollowedRun(run), ValidateConfig(**VALIDATION)).done
        held_up = traffic.seconds.get(threading.get_ident(), 0.0)
        results.append((time.perf_counter() - start, done, held_up))

    with (
        mock.patch.object(Session, "request", traffic.timed(Session.request)),
        mock.patch.object(fetching, "_fetch", traffic.timed(fetching._fetch)),
        mock.patch.object(prefetch._Fetch, "wait", traffic.timed(prefetch._Fetch.wait)),
        mock.patch.object(BackgroundTask, "wait", traffic.timed(BackgroundTask.wait)),
    ):
        threads = [threading.Thread(target=work) for _ in range(validators)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    evaluated = sum(done for _, done, _ in results)
    busy = max(seconds for seconds, _, _ in results) * validators
    held_up = sum(seconds for _, _, seconds in results)
    assert len(run_checkpoints(run)) == count
    return held_up / busy, 1 - evaluated * seconds / busy, evaluated - count


def covers_evenly(
    client: MlflowClient, directory: Path, validators: int, count: int, interval: float
) -> tuple[int, int, int]:
    """A trainer publishes three times as fast as one validator works, with `--order bisect`.

    Returns:
        How many checkpoints were done when the trainer ended, the widest gap between two of them in
        checkpoints, and how many are done in the end.
    """
    run = new_run(client)
    plan = ValidateConfig(**VALIDATION, order="bisect", poll_seconds=interval)
    context = get_context("fork")
    processes = [context.Process(target=_follow, args=(run.id, plan)) for _ in range(validators)]
    for process in processes:
        process.start()
    time.sleep(SECONDS_TO_BEGIN)
    for step in range(count):
        publish(run, directory, step)
        time.sleep(interval)
    done = steps_done(client, run)
    client.set_terminated(run.id)
    for process in processes:
        process.join()
    gaps = [after - before for before, after in pairwise([-1, *done, count])]
    return len(done), max(gaps), len(steps_done(client, run))


def _follow(run_id: str, plan: ValidateConfig) -> None:
    run_validator(FollowedRun(find_run(connect(), run_id)), plan)


def steps_done(client: MlflowClient, run: TrackedRun) -> list[int]:
    """The steps that have a figure."""
    points = client.get_metric_history(run.id, "val/mrr_at_10")
    assert len(points) == len({point.step for point in points})
    return sorted(point.step for point in points)


@click.command()
@click.option("--checkpoints", default=1000, show_default=True)
@click.option("--validators", default=8, show_default=True)
@click.option("--poll-seconds", default=2.0, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Duration of one evaluation.")
def main(checkpoints: int, validators: int, poll_seconds: float, seconds: float) -> None:
    """Measure the cost of a poll, the time until a checkpoint is claimed, and the traffic."""
    print(machine())
    with (
        tempfile.TemporaryDirectory() as name,
        Server(Path(name)) as server,
        mock.patch.object(encoders, "load_encoder", lambda *_, **__: None),
        mock.patch.object(encoders, "check_vectors", lambda *_: None),
    ):
        directory = Path(name) / "encoder"
        directory.mkdir()
        (directory / "weights").write_text("1")
        client = connect(server.uri)
        for count in (10, checkpoints):
            requests, milliseconds = cost_of_a_poll(client, directory, count)
            print(f"a poll, {count:5} checkpoints done: {requests} requests, {milliseconds:.1f} ms")
        with mock.patch.object(encoders, "evaluate_all", waiting(0.0)):
            longest = begun_after(client, directory, poll_seconds, count=10)
        print(f"READY to claimed, polling every {poll_seconds} s: at most {longest:.2f} s")
        with mock.patch.object(encoders, "evaluate_all", waiting(seconds)):
            held_up, other, twice = share_of_traffic(
                client, directory, checkpoints, validators, seconds
            )
        print(
            f"{validators} validators, {checkpoints} checkpoints of {seconds} s: held up by "
            f"traffic {100 * held_up:.1f} % of the time, not evaluating {100 * other:.1f} %; "
            f"{twice} done twice"
        )
        with mock.patch.object(encoders, "evaluate_all", waiting(SLOW)):
            for number in (1, 2):
                done, gap, ended = covers_evenly(client, directory, number, 30, SLOW / 3)
                print(
                    f"{number} validators by bisection, 30 checkpoints three times as fast as one "
                    f"works: {done} done when the trainer ends, the widest gap {gap} "
                    f"checkpoints; {ended} in the end"
                )


if __name__ == "__main__":
    main()
