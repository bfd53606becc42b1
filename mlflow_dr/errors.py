"""Every error that mlflow_dr raises on purpose.

The command line prints the message on one line and exits with `exit_code`: 2 for a command that
was written wrongly, 1 for everything else. Each message says what was found, where (file:line, key
or id) and what to do about it.

    MlflowDrError
    ├── UsageError           a name, flag or value that the command does not take
    │   └── DeviceError      a device or dtype that this machine does not have
    ├── DataError            a file of a collection that is missing, malformed or contradicts itself
    ├── TrainingError        training cannot go on: its loss is not a number
    ├── CheckpointError      a checkpoint that cannot be trusted or loaded
    │   └── UnavailableError     ... that cannot be fetched or read here, perhaps for now
    │       └── LostError            ... whose files are gone from a store that answers
    ├── TrackingError        the tracking server, or a run on it, is not what was asked for
    │   ├── RunGoneError     ... was deleted, or never was
    │   ├── NoValuesError    ... has no values of single queries of a checkpoint
    │   └── ForbiddenError   ... allows this user something less
    ├── MissingExtraError    an optional dependency is not installed
    └── ChildError           a trainer or validator started by `mlflow-dr run` ended with an error
"""

import reprlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from mlflow_dr.terminal import one_line_of, shortened

LONGEST_QUOTE = 100
_quote = reprlib.Repr()
_quote.maxlevel, _quote.maxstring, _quote.maxother, _quote.maxlong = 2, 100, 100, 100


def one_line(error: BaseException) -> str:
    """Kind and text of any error on one line, of some 300 characters at most, without secrets."""
    return f"{type(error).__name__}: {one_line_of(str(error), 300)}".rstrip(": ")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest to one that is not known, as the end of a message."""
    by_lower_case = {one.lower(): one for one in known}
    close = get_close_matches(word.lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__


def quoted(value: object) -> str:
    """A value from a file as a message quotes it: its first 100 characters."""
    # of a long text or list only the start is made printable; aliases of YAML can make of a small
    # file an endless one
    start = value[: LONGEST_QUOTE + 1] if isinstance(value, str | bytes | list) else value
    try:
        shown = repr(start) if isinstance(start, str | bytes) else _quote.repr(start)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        shown = "a whole number of thousands of digits"
    return shown if len(shown) <= LONGEST_QUOTE else f"{shown[: LONGEST_QUOTE - 3]}..."


class MlflowDrError(Exception):
    """Base of all errors raised on purpose; a message is shortened to a line that can be read."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


class UsageError(MlflowDrError):
    """A name, flag or value that the command does not take."""

    exit_code = 2


class DeviceError(UsageError):
    """A device or dtype that this machine does not have."""


class DataError(MlflowDrError):
    """A file of a collection is missing, malformed or contradicts itself."""


class CheckpointError(MlflowDrError):
    """A checkpoint cannot be trusted (bytes, shapes, NaN) or loaded."""


class UnavailableError(CheckpointError):
    """A checkpoint cannot be fetched or read on this machine, which says nothing about it.

    Args:
        message: the reason.
        lasting: whether another try in this process is of no use: a module is missing, say.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class LostError(UnavailableError):
    """The files of a checkpoint are gone, although their store answers."""


class TrainingError(MlflowDrError):
    """Training cannot go on: its loss is not a number."""


class TrackingError(MlflowDrError):
    """The tracking server cannot be reached, or the run is not what was asked for."""


class RunGoneError(TrackingError):
    """A run was deleted, or there is none with that id."""


class NoValuesError(TrackingError):
    """A run has no values of single queries of a checkpoint; older ones have none."""


class ForbiddenError(TrackingError):
    """The tracking server, or where its artifacts lie, does not allow this user what was asked."""


class MissingExtraError(MlflowDrError):
    """An optional dependency is not installed; the message names the extra to install."""


class ChildError(MlflowDrError):
    """A trainer or validator that `mlflow-dr run` started has ended with an error."""
