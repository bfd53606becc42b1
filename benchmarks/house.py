"""How large the package is, and how much of it one command passes through.

    python -m benchmarks.house

Prints lines of code, files, classes, names with two meanings, and, by running `train`, `validate`
and `evaluate` on the built-in collection under a profiler, the package files whose functions run,
the file-to-file calls, and the package's own types that are made. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import mlflow_dr

PACKAGE = Path(mlflow_dr.__file__).parent

TRACER = """
import json, sys, threading
from pathlib import Path
package, out = sys.argv[1], sys.argv[2]
files, arrows, types = set(), set(), set()

def name(frame):
    path = frame.f_code.co_filename
    return path[len(package) + 1:] if path.startswith(package) else None

def profile(frame, event, arg):
    if event != "call":
        return
    code = frame.f_code
    if code.co_argcount and code.co_name in ("__init__", "__new__"):
        first = frame.f_locals.get(code.co_varnames[0])
        made = first if isinstance(first, type) else type(first)
        if made.__module__.startswith("mlflow_dr"):
            types.add(f"{made.__module__}.{made.__qualname__}")
    here = name(frame)
    is_body = code.co_name == "<module>" or not code.co_flags & 1  # CO_OPTIMIZED: functions
    if here is None or is_body:
        return
    files.add(here)
    caller = frame.f_back
    while caller is not None and name(caller) is None:
        caller = caller.f_back
    if caller is not None and caller.f_code.co_flags & 1 and name(caller) != here:
        arrows.add((name(caller), here))

sys.argv = ["mlflow-dr", *sys.argv[3:]]
from mlflow_dr.cli import main
threading.setprofile(profile)
sys.setprofile(profile)
try:
    main()
finally:
    sys.setprofile(None)
    threading.setprofile(None)
    Path(out).write_text(json.dumps([sorted(files), sorted(arrows), sorted(types)]))
"""


def code_lines(tree: ast.AST, text: str) -> set[int]:
    """The numbers of lines with code: neither blank nor comment nor docstring."""
    lines = {
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:  # also the docstrings of attributes
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    last = statement.end_lineno or statement.lineno
                    lines -= set(range(statement.lineno, last + 1))
    return lines


def sizes() -> dict[str, object]:
    """Lines, files, classes, the longest of each, and names with two meanings."""
    total = classes = 0
    longest_file, longest_function = (0, ""), (0, "")
    homes: dict[str, list[str]] = defaultdict(list)
    paths = sorted(PACKAGE.rglob("*.py"))
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = code_lines(tree, text)
        name = path.relative_to(PACKAGE).as_posix()
        total += len(lines)
        rooms[name.split("/")[0] if "/" in name else "(top)"][0] += 1
        rooms[name.split("/")[0] if "/" in name else "(top)"][1] += len(lines)
        longest_file = max(longest_file, (len(lines), name))
        for node in ast.walk(tree):
            classes += isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                longest_function = max(
                    longest_function, (len(lines & set(span)), f"{name}:{node.name}")
                )
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                homes[node.name].append(name)
    twice = sorted(name for name, at in homes.items() if len(at) > 1)
    return {
        "code lines": total,
        "files": len(paths),
        "classes": classes,
        "longest file": longest_file,
        "longest function": longest_function,
        "public names with two meanings": (len(twice), twice),
        "rooms (files, code lines)": dict(rooms),
    }


def traced(out: Path, *arguments: str) -> tuple[list[str], list[list[str]], list[str]]:
    """The files, file-to-file calls and own types of one command."""
    subprocess.run(
        [sys.executable, "-c", TRACER, str(PACKAGE), str(out), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    files, arrows, types = json.loads(out.read_text())
    return files, arrows, types


def ways(folder: Path) -> dict[str, tuple[list[str], list[list[str]], list[str]]]:
    """The three main commands on the built-in collection."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ["MLFLOW_DR_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    training = ("--dataset", "demo", "--model", "tiny", "--max-steps", "20", "--publish-steps")
    found = {"train": traced(folder / "train.json", "train", *training, "10")}
    from mlflow_dr.tracking.client import connect

    run = connect(None).search_runs(["0"])[0].info.run_id
    model = connect(None).search_logged_models(["0"])[0].model_id
    found["validate"] = traced(folder / "validate.json", "validate", "--run-id", run, "--once")
    found["evaluate"] = traced(
        folder / "evaluate.json", "evaluate", f"models:/{model}", "--dataset", "demo"
    )
    return found


def seconds(*command: str, rounds: int = 5) -> float:
    """The shortest time of a command, in s."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - start)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", action="store_true", help="print only the sizes; run no command")
    parser.add_argument(
        "--names", action="store_true", help="also print the names of the files and types"
    )
    options = parser.parse_args()
    for name, value in sizes().items():
        print(f"{name}: {value}")
    if options.sizes:
        return
    print(f"mlflow-dr --help: {seconds(sys.executable, '-m', 'mlflow_dr', '--help'):.2f} s")
    print(f"import mlflow_dr: {seconds(sys.executable, '-c', 'import mlflow_dr'):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        for command, (files, arrows, types) in ways(Path(folder)).items():
            print(f"{command}: {len(files)} files, {len(arrows)} arrows, {len(types)} own types")
            if options.names:
                print("  " + " ".join(files), "  " + " ".join(types), sep="\n")


if __name__ == "__main__":
    main()
