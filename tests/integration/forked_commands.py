"""Runs `mlflow-dr` commands, which may end themselves by a signal at a chosen place.

Each line of input, `TIMES PLACE SIGNAL WORDS...`, is one command in processes of its own, which
are forks of this one, so that torch and mlflow are imported once. Prints `started PID` before and
`ended CODE` after what each prints. At the place `nowhere` there is no signal.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss  # noqa: F401 - what the commands import late is imported before the forks
import pytrec_eval  # noqa: F401
from mlflow import MlflowClient
from transformers import BertModel, BertTokenizer  # noqa: F401

from mlflow_dr import cli
from mlflow_dr.retrieval import dense
from mlflow_dr.tracking import pruning, results
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.validation import jobs

Wrapper = Callable[[Callable[..., Any], Callable[[], None]], Callable[..., Any]]


def before(function: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        die()
        return function(*args, **options)

    return wrapped


def after(function: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        die()
        return result

    return wrapped


def amid(function: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Iterator[Any]:
        batches = function(*args, **options)
        yield next(batches)
        die()
        yield from batches

    return wrapped


PLACES: dict[str, tuple[Any, str, Wrapper]] = {
    "loading": (jobs, "load_encoder", before),
    "encoding": (dense, "encode_batches", amid),
    "before-claiming": (Claims, "claim", before),
    "after-claiming": (Claims, "claim", after),
    "before-recording": (jobs, "record_result", before),
    "after-recording": (results, "_write_metrics", before),
    "before-metrics": (MlflowClient, "log_batch", before),
    "before-removing": (pruning, "_empty", before),
    "after-removing": (pruning, "_empty", after),
    "after-metrics": (MlflowClient, "log_batch", after),
}


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def main() -> None:
    for line in sys.stdin:
        times, place, name, *words = line.split()
        children = [_started(place, name, words) for _ in range(int(times))]
        for child in children:
            _, status = os.waitpid(child, 0)
            print("ended", os.waitstatus_to_exitcode(status), flush=True)


def _started(place: str, name: str, words: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    print("started", os.getpid(), flush=True)
    if place != "nowhere":
        owner, function, wrapper = PLACES[place]
        die = partial(_die, signal.Signals[name])
        setattr(owner, function, wrapper(getattr(owner, function), die))
    sys.argv = ["mlflow-dr", *words]
    cli.main()


if __name__ == "__main__":
    main()
