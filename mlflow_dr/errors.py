"""Every error that mlflow_dr raises on purpose.

The command line prints the message on one line and exits with `exit_code`: 2 for a wrong command,
1 for everything else. Each message says what is wrong, where (file:line, key or id) and what to do.

    MlflowDrError
    ├── UsageError           a name, flag or value that is not allowed
    │   └── DeviceError      a device or dtype that this machine does not have
    ├── DataError            a file of a collection that is missing, malformed or contradicts itself
    ├── TrainingError        training cannot go on: its loss is not a number
    ├── CheckpointError      a checkpoint that cannot be trusted or loaded
    │   ├── OverdueError         ... whose validation took too long
    │   └── UnavailableError     ... that cannot be fetched or read on this machine
    │       └── LostError            ... because its files are gone from the store
    ├── TrackingError        the tracking server cannot be reached, or a run cannot be used
    │   ├── RunGoneError     ... because it was deleted or never existed
    │   ├── NoValuesError    ... because it has no values of single queries of a checkpoint
    │   └── ForbiddenError   ... because the server does not allow it to this user
    ├── HubError             the Hugging Face hub cannot be reached, or refuses an upload
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
    """Class and text of any error on one line, without secrets, in about 300 characters."""
    return f"{type(error).__name__}: {one_line_of(str(error), 300)}".rstrip(": ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to an unknown one, as the end of a message."""
    by_lower_case = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def quoted(value: object) -> str:
    """A value from a file as a message quotes it, in at most 100 characters."""
    # only the start of a long value is formatted, because YAML's aliases can make an endless one
    start = value[: LONGEST_QUOTE + 1] if isinstance(value, str | bytes | list) else value
    try:
        shown = repr(start) if isinstance(start, str | bytes) else _quote.repr(start)
    except ValueError:  # Python does not format integers of more than 4,300 digits
        shown = "an integer of thousands of digits"
    return shown if len(shown) <= LONGEST_QUOTE else f"{shown[: LONGEST_QUOTE - 3]}..."


class MlflowDrError(Exception):
    """Base of all errors that are raised on purpose; a long message is shortened."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


class UsageError(MlflowDrError):
    """A name, flag or value that is not allowed."""

    exit_code = 2


class DeviceError(UsageError):
    """A device or dtype that this machine does not have."""


class DataError(MlflowDrError):
    """A file of a collection is missing, malformed or contradicts itself."""


class CheckpointError(MlflowDrError):
    """A checkpoint cannot be trusted (bytes, shapes, NaN) or loaded."""


class OverdueError(CheckpointError):
    """The validation of a checkpoint took longer than it may."""


class UnavailableError(CheckpointError):
    """A checkpoint cannot be fetched or read on this machine; others may be able to.

    Args:
        message: the reason.
        lasting: whether another attempt in this process is useless, as when a module is missing.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class LostError(UnavailableError):
    """The files of a checkpoint are gone from a store that can be reached."""


class TrainingError(MlflowDrError):
    """Training cannot go on: its loss is not a number."""


class TrackingError(MlflowDrError):
    """The tracking server cannot be reached, or a run cannot be used."""


class RunGoneError(TrackingError):
    """A run was deleted or never existed."""


class NoValuesError(TrackingError):
    """A run has no values of single queries of a checkpoint."""


class ForbiddenError(TrackingError):
    """The tracking server or its artifact store does not allow a request to this user."""


class HubError(MlflowDrError):
    """The Hugging Face hub cannot be reached, or refuses an upload."""


class MissingExtraError(MlflowDrError):
    """An optional dependency is not installed; the message names the extra to install."""


class ChildError(MlflowDrError):
    """A trainer or validator that `mlflow-dr run` started has ended with an error."""
