"""Runs `mlflow-dr` commands, which may end themselves by a signal at a chosen place.

Each line of input, `PLACE SIGNAL WORDS...`, is one command in a process of its own, which is a fork
of this one, so that torch and mlflow are imported once. Prints `started PID` before and `ended
CODE` after what the command prints. At the place `nowhere` there is no signal.
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
from mlflow_dr.validation import watch

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
    "loading": (watch, "load_encoder", before),
    "encoding": (dense, "encode_batches", amid),
    "before-recording": (MlflowClient, "log_model_params", before),
    "after-recording": (MlflowClient, "log_model_params", after),
    "before-metrics": (MlflowClient, "log_batch", before),
    "after-metrics": (MlflowClient, "log_batch", after),
}


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def main() -> None:
    for line in sys.stdin:
        place, name, *words = line.split()
        child = os.fork()
        if child == 0:
            print("started", os.getpid(), flush=True)
            if place != "nowhere":
                owner, function, wrapper = PLACES[place]
                die = partial(_die, signal.Signals[name])
                setattr(owner, function, wrapper(getattr(owner, function), die))
            sys.argv = ["mlflow-dr", *words]
            cli.main()
        _, status = os.waitpid(child, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
