"""Runs `mlflow-dr` commands in forks of one process, so that torch and mlflow are imported once.

Each line of input is a command as JSON; `Order` has its keys. A command may send itself a signal at
a moment of `MOMENTS`; `step-3` is the third time that `step` is reached.
"""

import atexit
import gc
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import faiss  # noqa: F401 - what the commands import late is imported before the forks
import git  # noqa: F401
import pytrec_eval  # noqa: F401
from mlflow import MlflowClient
from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
from transformers import BertModel, BertTokenizer  # noqa: F401

from mlflow_dr import cli
from mlflow_dr.mining import mine  # noqa: F401
from mlflow_dr.retrieval import shard_search
from mlflow_dr.tracking import pruning, results
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training import publishing, train, trainer
from mlflow_dr.training.loss import Objective
from mlflow_dr.validation import worker

NOWHERE = "nowhere"

Wrapper = Callable[[Callable[..., Any], Callable[[], None]], Callable[..., Any]]


class Order(NamedTuple):
    """A command.

    Attributes:
        argv: after `mlflow-dr`.
        variables: all that it sees.
        directory: where it runs.
        output: the file or named pipe that it prints to.
        errors: the same for its standard error.
        state: a named pipe that gets its process id, and then how it ended.
        moment: when it sends itself a signal; see `MOMENTS`.
        number: that signal.
    """

    argv: list[str]
    variables: dict[str, str]
    directory: str
    output: str
    errors: str
    state: str
    moment: str
    number: int


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


MOMENTS: dict[str, tuple[Any, str, Wrapper]] = {
    "loading": (worker, "load_encoder", before),
    "encoding": (shard_search, "encode_batches", amid),
    "before-claiming": (Claims, "claim", before),
    "after-claiming": (Claims, "claim", after),
    "before-recording": (worker, "record_result", before),
    "after-recording": (results, "_write_metrics", before),
    "before-metrics": (MlflowClient, "log_batch", before),
    "after-metrics": (MlflowClient, "log_batch", after),
    "before-removing": (pruning, "_empty", before),
    "after-removing": (pruning, "_empty", after),
    "step": (Objective, "__call__", before),
    "saving": (trainer, "save_encoder", after),
    "marking": (trainer, "mark_complete", before),
    "marked": (trainer, "mark_complete", after),
    "rotating": (trainer, "rotate_checkpoints", before),
    "uploading": (publishing, "upload_checkpoint", before),
    "uploaded": (publishing, "upload_checkpoint", after),
    "beginning": (train, "_describe", after),
    "finishing": (TrackedRun, "finish", before),
}


def main() -> None:
    gc.freeze()  # what is imported is neither searched nor copied by the forks
    print("ready", flush=True)
    for line in sys.stdin:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # attendants that are done
                pass
        if os.fork() == 0:
            _attend(Order(**json.loads(line)))
            break


def _attend(order: Order) -> None:
    """Become the command in a fork, and report its state here."""
    with open(order.state, "w") as state:  # noqa: PTH123
        printing = [os.open(name, os.O_WRONLY) for name in (order.output, order.errors)]
        child = os.fork()
        if child == 0:
            state.close()
            _become(order, *printing)
        for number in printing:
            os.close(number)
        print(child, file=state, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=state, flush=True)
    os._exit(0)


def _become(order: Order, output: int, errors: int) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order.variables)
    os.chdir(order.directory)
    tempfile.tempdir = None
    tempfile.gettempdir()  # known, as it is wherever torch was imported, before there are threads
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    name, _, count = order.moment.rpartition("-")
    name, count = (name, count) if count.isdigit() else (order.moment, "1")
    if name != NOWHERE:
        owner, function, wrapper = MOMENTS[name]
        die = partial(_die, int(count), order.number, [])
        setattr(owner, function, wrapper(getattr(owner, function), die))
    sys.argv = ["mlflow-dr", *order.argv]
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End as Python does, but free no memory: that takes half a second in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die(count: int, number: int, times: list[int]) -> None:
    times.append(1)
    if len(times) == count:
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
