"""The command line: each command parses, calls one library function and prints.

Commands are imported when they are used, so that `mlflow-dr --help` needs neither torch nor mlflow.
"""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from mlflow_dr.errors import MlflowDrError, did_you_mean, one_line
from mlflow_dr.terminal import (
    guard_streams,
    log_line,
    one_line_of,
    shortened,
    without_secrets,
)
from mlflow_dr.version import VERSION

INTERRUPTED = 130
LONGEST_LOG_LINE = 4000  # characters, below the level of a warning

COMMANDS = {
    "run": "Train and validate side by side; what `mlflow run .` calls.",
    "train": "Train an encoder and publish its checkpoints to MLflow.",
    "jax-train": "Train on TPUs, as Tevatron's jax_train does.",
    "validate": "Validate each checkpoint of a run, now and as they come.",
    "fidelity": "Find the subset that chooses the right checkpoint sooner.",
    "ui": "Start MLflow's pages on the curves of the latest run.",
    "runs": "List the latest runs with their best values.",
    "status": "Show figures, best, and what is open or failed of a run.",
    "report": "Write a page about a run: curves, best, queries, cost.",
    "best": "Show a run's best checkpoint; download or register it.",
    "compare": "Compare encoders query by query, and test the difference.",
    "prune": "Delete the files of checkpoints that are no longer needed.",
    "evaluate": "Measure one encoder on one collection, without tracking.",
    "encode": "Encode passages or queries into files of vectors.",
    "search": "Rank passages for queries, from files of vectors.",
    "index": "Build a FAISS index of vectors, and measure its recall.",
    "convert": "Write a ranking in another format.",
    "import": "Write an encoder from a checkpoint of DPR or GC-DPR.",
    "export": "Write an encoder as a checkpoint of DPR and GC-DPR.",
    "dpr": "Run a program of GC-DPR by its own name and flags.",
    "mine": "Find hard negatives of queries, by BM25 or an encoder.",
    "reader-data": "Prepare a retriever's results for the reader.",
    "reader-train": "Train a reader, which finds answers in passages.",
    "reader-validate": "Measure each checkpoint of a reader's run.",
    "reader-predict": "Answer questions with a reader, and measure exact match.",
    "qa": "Train a retriever and a reader, and answer questions.",
    "subset": "Write a subset of a collection to files.",
    "loaders": "Measure ways to load documents: speed, memory, waiting.",
    "datasets": "List the names of collections.",
    "doctor": "Check machine, server and hub, before something fails.",
    "cache": "List what is kept in the cache, and remove it.",
}
MODULES = {
    **dict.fromkeys(("run", "jax-train"), "train"),
    **dict.fromkeys(("fidelity", "compare"), "evaluate"),
    **dict.fromkeys(("ui", "status", "best", "prune"), "runs"),
    **dict.fromkeys(("encode", "search", "index", "convert"), "vectors"),
    **dict.fromkeys(("import", "export"), "dpr"),
    "dpr": "dpr_programs",
    **dict.fromkeys(("doctor", "cache"), "machine"),
    **dict.fromkeys(("mine", "subset", "datasets"), "collections"),
    **dict.fromkeys(
        tuple(f"reader-{name}" for name in ("data", "train", "validate", "predict")), "reader"
    ),
}
"""The modules of commands that have none of their own name."""


class _Commands(click.Group):
    """A group that imports a command when it is called; its line of help stands here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        os.environ["MLFLOW_DR_COMMAND"] = cmd_name
        module = importlib.import_module(f"mlflow_dr.cli.{MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="mlflow-dr")
def group() -> None:
    """Train dense retrievers and validate their checkpoints while training goes on.

    \b
    Example:
        mlflow-dr run --dataset demo
    """


def main() -> NoReturn:
    """Run the command line; every known error becomes one line and an exit code."""
    # with torch imported, looking for garbage as often as Python does by default takes a sixth of
    # the time to the first batch, and a third of the time of tokenising
    gc.set_threshold(2000, 10, 100)
    guard_streams()
    typed = without_secrets(shlex.join(["mlflow-dr", *sys.argv[1:]]))
    os.environ.setdefault("MLFLOW_DR_COMMAND_LINE", shortened(typed, LONGEST_LOG_LINE))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    package = logging.getLogger("mlflow_dr")
    package.setLevel(logging.INFO)
    package.propagate = False
    # `Patience` logs once that it is away; urllib3 would at each try
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    package.handlers = [handler]
    signal.signal(signal.SIGTERM, _interrupt)
    code = _run()
    gc.freeze()  # the interpreter's last collection takes a second with torch and mlflow imported
    sys.exit(code)


def _run() -> int:
    try:
        result = group.main(standalone_mode=False, prog_name="mlflow-dr")
        return result if isinstance(result, int) else 0
    except MlflowDrError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        hint = f"see `{error.ctx.command_path} --help`" if error.ctx else ""
        return _fail(f"{message}{' ' if message.endswith('?') else '; '}{hint}", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__
        if isinstance(cause, EOFError):  # click takes every EOFError for the end of the input
            return _fail(f"what was read ended too early ({one_line(cause)})", 1)
        click.echo("stopped", err=True)  # the user asked for it
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error.filename or error}); make room and go on", 1)
        return _fail(f"{type(error).__name__}: {error}", 1)


class _Lines(logging.Formatter):
    """A message on one line; a warning or an error begins with its level."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return log_line(record.getMessage(), LONGEST_LOG_LINE)
        return f"{record.levelname.lower()}: {one_line_of(record.getMessage())}"


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {one_line_of(message)}", err=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
