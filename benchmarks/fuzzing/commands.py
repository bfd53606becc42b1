"""Command lines in which one argument is damaged, removed or repeated."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import checkpoints, collections, odd
from benchmarks.fuzzing.case import Case, Kind, RefusedError, unprintable
from benchmarks.fuzzing.encoders import templates
from mlflow_dr import cli

SOUND = (
    "evaluate encoder --dataset set --measures 'mrr@10 ndcg@10' --dtype fp32 --depth 9 --split dev",
    "evaluate encoder --dataset set --subset random:3 --seed 3 --judged all --p-max-len 20",
    "subset --dataset set --subset bm25@3+random:2 --output made --shards 2 --format beir",
    "subset --dataset set --subset full --output made --format asyncval --tokenizer encoder",
    "mine --dataset set --split dev --output mined.jsonl --depth 5 --negatives 2",
    "datasets",
    "status --run-id RUN --tracking-uri STORE",
    "best --run-id RUN --metric val/mrr_at_10 --tracking-uri STORE",
    "prune --run-id RUN --keep best:3,last:2 --dry-run --tracking-uri STORE",
    "validate --run-id RUN --once --measures mrr@10 --order bisect --every 2 --tracking-uri STORE",
    "validate --experiment none --once --subset bm25@5 --refine full@3 --keep last:3 --patience 3 "
    "--tracking-uri STORE",
    "compare encoder encoder --dataset set --split dev --measure mrr@10 --dtype fp32",
)
MORE = ("--no-such", "-x", "--", "\x1b[31m", "--measures=", "--dtype=\u202e", "@file", "--help")


def run(argv: list[str]) -> str:
    """Run a command and return its output.

    Raises:
        RefusedError: the command ended with an error; contains its last line.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["mlflow-dr", *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli._run()
    finally:
        sys.argv = before
    for line in (*out.getvalue().split("\n"), *re.split("[\r\n]", err.getvalue())):
        if problem := unprintable(line.replace("\t", " ").removesuffix("\r")):
            raise RefusedError(f"{problem} in {line!r}\x1b")
    if code:
        raise RefusedError(err.getvalue().strip("\n").rpartition("\n")[2])
    return out.getvalue()


@cache
def published() -> tuple[str, str]:
    """A store, and a run in it that has published a checkpoint."""
    folder = Path(tempfile.mkdtemp())
    run = checkpoints.fresh_run(folder)
    shutil.copytree(templates()["ours"], folder / "encoder")
    checkpoints.publish(run, folder / "encoder", 5)
    return f"sqlite:///{tempfile.gettempdir()}/fuzz-store/mlflow.db", run.id


def commands(chance: Random, workdir: Path) -> Case:
    """A command line in which one argument is damaged, removed or repeated."""
    set_, encoder = workdir / "set", workdir / "encoder"
    collections.beir_folder(set_)
    shutil.copytree(templates()["ours"], encoder)
    store, run_id = published()
    values = {"RUN": run_id, "STORE": store}
    sound = [values.get(word, word) for word in shlex.split(chance.choice(SOUND))]
    argv = list(sound)
    index = chance.randrange(len(argv))
    act = chance.randrange(6)
    if act == 0 and len(argv) > 1:
        how = f"{argv.pop(index)!r:.40} left out"
    elif act == 1:
        argv.insert(index, argv[index])
        how = f"{argv[index]!r:.40} twice"
    elif act == 2:
        argv.append(chance.choice(MORE))
        how = f"{argv[-1]!r} more"
    else:
        old = argv[index]
        argv[index], how = odd.word(chance, old)
        how = f"{old!r:.40} {how}: {argv[index]!r:.40}"
    # a shell cannot pass NULs or lone surrogates
    argv = [word.replace("\x00", "").encode("utf-8", "replace").decode()[:100_000] for word in argv]
    if argv and argv[0] in ("validate", "run", "train", "fidelity") and "--once" not in argv:
        argv.append("--once")
    names = (
        "--",
        "`mlflow-dr",
        *(part[:10] for word in argv for part in re.split(r"[\s@:,+=]|--", word) if len(part) > 2),
        *(repr(part)[:10] for word in argv for part in (word, *word.split())),
        "tracking store",
    )

    def read() -> Any:
        run(argv)
        return "ended well"

    return Case(f"{sound[0]}: {how}", read, lambda: "ended well", names)


KINDS = [Kind("command", commands, 4, published)]
