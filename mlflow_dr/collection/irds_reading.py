"""What ir_datasets raises and prints while it reads, as one error or one line of the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow_dr.errors import DataError, MissingExtraError, MlflowDrError

log = logging.getLogger(__name__)

HOME_VARIABLE = "IR_DATASETS_HOME"
PROGRESS_MESSAGES = ("[", "download error", "Download failed")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Keeps ir_datasets quiet, and turns whatever it raises into one error about `what`.

    What it would have printed is logged as information, or becomes the way out of the error.
    """
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        heard.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger("ir_datasets")
    logger.addFilter(hear)
    try:
        yield
    except MlflowDrError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"{what}: {error}") from error
    except Exception as error:
        failures = _failures(error)
        causes = "; ".join(dict.fromkeys(map(_cause, failures)))
        raise DataError(f"{what} cannot be read: {causes}; {_way_out(failures, heard)}") from error
    finally:
        logger.removeFilter(hear)
    for message in heard:
        if not message.startswith(PROGRESS_MESSAGES):
            log.info("ir_datasets: %s", message)


def _failures(error: Exception) -> list[Exception]:
    """The error itself, or for a failed download the errors of its mirrors."""
    match error.args:
        # ir_datasets.util.Download raises RuntimeError(text, [(mirror, error), ...])
        case (str(), [(_, Exception()), *_] as failures):
            errors = [failure for _, failure in failures]
            return [each for each in errors if not isinstance(each, FileNotFoundError)] or errors
    return [error]


def _cause(error: Exception) -> str:
    kind = type(error).__name__
    if host := _host(error):
        return f"the download from {host} failed ({kind})"
    return " ".join(f"{kind}: {error}".split())


def _host(error: Exception) -> str:
    """The server that an error of `requests` is about; empty for any other error."""
    request = getattr(error, "request", None)
    return urlsplit(request.url).netloc if request is not None else ""


def _way_out(failures: list[Exception], heard: list[str]) -> str:
    home = str(Path(os.environ.get(HOME_VARIABLE, "~/.ir_datasets")).expanduser())
    # ir_datasets prints where a file belongs that was, or can only be, fetched by hand
    by_hand = next((message for message in reversed(heard) if home in message), None)
    if any(_host(error) for error in failures):
        files = f"put the files under {home} ({HOME_VARIABLE})"
        return f"connect to the network, or {by_hand or files}"
    if by_hand and isinstance(failures[-1], FileNotFoundError):
        return by_hand
    return (
        f"remove what is damaged under {home} ({HOME_VARIABLE}) and read again; "
        "if the error stays, upgrade ir_datasets"
    )
