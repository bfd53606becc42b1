"""A case of the fuzzer, and how its outcome is judged."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr import cli
from mlflow_dr.errors import MlflowDrError

LONGEST = 500
EQUAL, REFUSED, FINDING = "equal", "refused", "finding"
DIRECTION = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UnreadableError(Exception):
    """The independent reader rejects the input."""


class RefusedError(MlflowDrError):
    """The last line that a command printed when it ended with an error."""


class AnyOf(tuple[Any, ...]):
    """Several values, each of which is right."""

    __slots__ = ()


class Case(NamedTuple):
    """One malformed input.

    Attributes:
        what: what was damaged, and how.
        ours: reads the input with mlflow_dr.
        right: reads it independently; raises `UnreadableError` if it must be refused.
        names: files or keys; a refusal must contain one of them.
        refusable: whether the input may be refused.
    """

    what: str
    ours: Callable[[], Any]
    right: Callable[[], Any]
    names: Sequence[str]
    refusable: bool = True


class Kind(NamedTuple):
    """A kind of cases.

    Attributes:
        name: the value of `--kind`.
        make: makes a case from a random generator and an empty folder.
        share: number of cases relative to the other kinds.
        prepare: creates what all cases of the kind need.
    """

    name: str
    make: Callable[[Random, Path], Case]
    share: int
    prepare: Callable[[], object] = dict


class Verdict(NamedTuple):
    """The outcome of a case.

    Attributes:
        outcome: `equal`, `refused` or `finding`.
        cause: the same for findings that probably have the same cause.
        text: the refusal, or what is wrong.
        what: what was damaged, and how.
    """

    outcome: str
    cause: str = ""
    text: str = ""
    what: str = ""


class _Lines(logging.Handler):
    """Log lines as the command line prints them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = cli._Lines().format(record)
        self.lines.append(line.encode("utf-8", "backslashreplace").decode())


def judged(case: Case) -> Verdict:
    """Run a case and judge its outcome."""
    package = logging.getLogger("mlflow_dr")
    package.propagate = False
    package.setLevel(logging.INFO)
    package.handlers = [lines := _Lines()]
    verdict = _outcome(case)._replace(what=case.what)
    if verdict.outcome != FINDING:
        for line in lines.lines:
            if problem := unprintable(line):
                return Verdict(FINDING, f"log line: {problem}", repr(line)[:400], case.what)
    return verdict


def _outcome(case: Case) -> Verdict:
    try:
        value = case.ours()
    except MlflowDrError as error:
        return _refusal(case, error)
    except Exception as error:  # noqa: BLE001 - tracebacks are what the fuzzer looks for
        return Verdict(
            FINDING,
            f"traceback: {_origin(error)}",
            "".join(traceback.format_exception(error))[-1500:],
        )
    try:
        right = case.right()
    except UnreadableError as error:
        return Verdict(FINDING, f"accepted: {error}", f"ours: {value!r:.600}")
    if any(same(value, option) for option in (right if isinstance(right, AnyOf) else (right,))):
        return Verdict(EQUAL)
    text = difference(value, right)
    return Verdict(
        FINDING, f"different value at {re.sub(r'[0-9]+', 'N', text.partition(': ours')[0])}", text
    )


def _refusal(case: Case, error: MlflowDrError) -> Verdict:
    shown = printed(error)
    if not case.refusable:
        return Verdict(FINDING, f"refused what must be read: {_origin(error)}", shown[:600])
    problem = unprintable(shown)
    if not problem and len(shown) >= LONGEST:
        problem = f"{LONGEST} characters or more"
    if not problem and not any(name in shown for name in case.names):
        problem = "names neither file nor key"
    if problem:
        return Verdict(FINDING, f"refusal: {problem}: {_origin(error)}", shown[:600])
    return Verdict(REFUSED, type(error).__name__, shown)


def printed(error: MlflowDrError) -> str:
    """The error as the command line prints it."""
    if isinstance(error, RefusedError):
        return str(error)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        cli._fail(str(error), error.exit_code)
    # as Python's standard error shows half of a surrogate pair
    shown = printed.getvalue().encode("utf-8", "backslashreplace").decode()
    return shown.removesuffix("\n")


def unprintable(line: str) -> str:
    """A description of the first control character; empty if there is none."""
    for character in line.replace("\t", " "):
        if unicodedata.category(character) in ("Cc", "Cs") or character in DIRECTION:
            return f"control character {ord(character):#06x}"
    return ""


def _origin(error: BaseException) -> str:
    """The type of an error, and the last function of the package in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/mlflow_dr/" in frame.filename]
    frame = own[-1] if own else frames[-1]
    file = frame.filename.rpartition("/mlflow_dr/")[2]
    return f"{type(error).__name__} in {file}:{frame.name}"


def same(ours: Any, right: Any) -> bool:
    """Whether two values are equal: NaN is NaN, floating-point arrays to 1e-5."""
    if isinstance(ours, np.ndarray) or isinstance(right, np.ndarray):
        a, b = np.asarray(ours), np.asarray(right)
        if a.shape != b.shape:
            return False
        if a.dtype.kind == "f" or b.dtype.kind == "f":
            return bool(np.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True))
        return bool(np.array_equal(a, b))
    if isinstance(ours, dict) and isinstance(right, dict):
        return ours.keys() == right.keys() and all(same(ours[key], right[key]) for key in ours)
    if isinstance(ours, list | tuple) and isinstance(right, list | tuple):
        return len(ours) == len(right) and all(map(same, ours, right))
    if isinstance(ours, float) and isinstance(right, float):
        return (math.isnan(ours) and math.isnan(right)) or math.isclose(
            ours, right, rel_tol=1e-6, abs_tol=1e-9
        )
    return type(ours) is type(right) and bool(ours == right)


def difference(ours: Any, right: Any, path: str = "") -> str:
    """A description of the first difference between two values."""
    if isinstance(right, AnyOf):
        return " or ".join(difference(ours, option) for option in right)
    if isinstance(ours, dict) and isinstance(right, dict) and ours.keys() == right.keys():
        pairs = [(f"[{key!r}]", ours[key], right[key]) for key in ours]
    elif (
        isinstance(ours, list | tuple)
        and isinstance(right, list | tuple)
        and len(ours) == len(right)
    ):
        pairs = [(f"[{index}]", *both) for index, both in enumerate(zip(ours, right, strict=True))]
    else:
        return f"{path or 'value'}: ours {ours!r:.250}, right {right!r:.250}"
    for step, a, b in pairs:
        if not same(a, b):
            return difference(a, b, path + step)
    return ""
