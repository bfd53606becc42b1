"""Runs commands in forks of one process, so that torch, mlflow and the rest are imported once.

    python forked_commands.py FOLDER

In the folder are two sockets. Each connection to `commands` brings a command as JSON, `Order` has
its keys, and its three files. Each connection to `users` is a process that uses this one, which
ends after the last of them. A command may send itself a signal at a moment of `MOMENTS`; `step-3`
is the third time that `step` is reached.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import faiss  # noqa: F401 - what the commands import late is imported before the forks
import git  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pytrec_eval  # noqa: F401
import sentence_transformers  # noqa: F401
import torch.distributed.run  # noqa: F401
import uvicorn  # noqa: F401 - before mlflow.server, which looks for it
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli
from mlflow.pyfunc import scoring_server  # noqa: F401
from mlflow.server import handlers  # noqa: F401
from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
from transformers import BertModel, BertTokenizer  # noqa: F401

from mlflow_dr import cli
from mlflow_dr.encoder.backbone import tiny_encoder
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.mining import mine  # noqa: F401
from mlflow_dr.retrieval import shard_search
from mlflow_dr.tracking import pruning, results
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training import publishing, train, trainer
from mlflow_dr.training.loss import Objective
from mlflow_dr.validation import encoders, worker
from mlflow_dr.validation.validations import EvalConfig

NOWHERE = "nowhere"
READ_AT_ONCE = 65536
WAITING = 64  # connections

Wrapper = Callable[[Callable[..., Any], Callable[[], None]], Callable[..., Any]]


class Order(NamedTuple):
    """A command.

    Attributes:
        argv: `mlflow-dr`, `mlflow` or `python`, and its arguments.
        variables: all that it sees.
        directory: where it runs.
        moment: when it sends itself a signal; see `MOMENTS`.
        number: that signal.
    """

    argv: list[str]
    variables: dict[str, str]
    directory: str
    moment: str = NOWHERE
    number: int = signal.SIGKILL


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
    "loading": (encoders, "load_encoder", before),
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


def main(folder: Path) -> None:
    _load_an_encoder()
    commands, users = (_listening(folder / name) for name in ("commands", "users"))
    print("ready", flush=True)
    gc.collect()
    gc.freeze()  # what is imported is neither searched nor copied by the forks
    assert threading.active_count() == 1  # others would be missing in the forks
    using: list[socket.socket] = []
    while True:
        ready, _, _ = select.select([commands, users, *using], [], [])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # attendants that are done
                pass
        if commands in ready:
            connection, _ = commands.accept()
            if os.fork() == 0:
                for other in (commands, users, *using):
                    other.close()
                _attend(connection)
            connection.close()
        if users in ready:
            using.append(users.accept()[0])
        for ended in set(ready) - {commands, users}:
            using.remove(ended)
            ended.close()
            if not using:
                return


def _load_an_encoder() -> None:
    """Have what libraries prepare when they first load an encoder prepared before the forks."""
    texts = ["The ferry leaves the island."]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "encoder"
        save_encoder(directory, tiny_encoder(texts, EncoderConfig("mean")))
        encoders.check_vectors(load_encoder(directory), EvalConfig((), device="cpu", dtype="fp32"))


def _listening(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(WAITING)
    return listening


def _attend(connection: socket.socket) -> NoReturn:
    """Have a fork become the command, and report its state to who asked; it ends with them."""
    message, files, _, _ = socket.recv_fds(connection, READ_AT_ONCE, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(READ_AT_ONCE)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(Order(**json.loads(message)), files)
    for number in files:
        os.close(number)
    with suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % child)
    ended, _, _ = select.select([connection, os.pidfd_open(child)], [], [])
    if connection in ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(order: Order, files: list[int]) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order.variables)
    os.chdir(order.directory)
    tempfile.tempdir = None
    tempfile.gettempdir()  # known, as it is wherever torch was imported, before there are threads
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    first = Path(os.environ["PATH"].partition(os.pathsep)[0]) / "python"
    if first.is_file():
        sys.executable = str(first)  # of its children
    name, _, count = order.moment.rpartition("-")
    name, count = (name, count) if count.isdigit() else (order.moment, "1")
    if name != NOWHERE:
        owner, function, wrapper = MOMENTS[name]
        die = partial(_die, int(count), order.number, [])
        setattr(owner, function, wrapper(getattr(owner, function), die))
    sys.argv = order.argv
    code: object = None
    try:
        {"mlflow-dr": cli.main, "mlflow": mlflow_cli, "python": _python}[order.argv[0]]()
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as Python does at the end of a program
        sys.excepthook(*sys.exc_info())
        code = 1
    _exit(int(code is not None) if not isinstance(code, int) else code)


def _python() -> None:
    """Do what Python does with these arguments: `-u -W -m -c`, or a script."""
    words = sys.argv[1:]
    while words[0] in ("-u", "-W"):
        if words.pop(0) == "-W":
            warnings._processoptions([words.pop(0)])  # type: ignore[attr-defined]
    what = words.pop(0)
    if what == "-m":
        sys.argv = words
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [what, *words]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


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
    main(Path(sys.argv[1]))
