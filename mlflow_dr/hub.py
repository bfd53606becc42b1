"""Whether the Hugging Face hub answers; its library waits without end for a hub that does not."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from mlflow_dr.background import BackgroundTask
from mlflow_dr.errors import one_line

log = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 5.0
SECONDS_WITH_NAMES = 8.0  # looking up the name of the host has no limit of its own
SECONDS_VALID = 60.0


@dataclass
class _Seen:
    """What is known of a hub: whether it was away, and when that was found out."""

    is_away: bool
    at: float


_hubs: dict[str, _Seen] = {}


def hub_is_away() -> bool:
    """Whether only what is on this machine can be used: the hub is off, or does not answer.

    A hub that does not answer is asked again after a minute, and named in one warning.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    url = constants.ENDPOINT
    seen = _hubs.get(url)
    if seen is None or time.monotonic() - seen.at > SECONDS_VALID:
        problem = _problem(url)
        if problem and not (seen and seen.is_away):
            log.warning(
                "the Hugging Face hub (%s) does not answer (%s): only files that are on this "
                "machine are used; HF_HUB_OFFLINE=1 saves the wait",
                url,
                problem,
            )
        seen = _hubs[url] = _Seen(bool(problem), time.monotonic())
    return seen.is_away


def _problem(url: str) -> str:
    """Why a hub cannot be asked; empty if it answers, whatever it says."""
    from huggingface_hub import get_session

    def ask() -> None:
        get_session().head(url, timeout=SECONDS_TO_ANSWER)

    task = BackgroundTask(ask, "asking the hub")
    try:
        task.wait(SECONDS_WITH_NAMES)
    except Exception as error:  # noqa: BLE001 - of the library's HTTP client
        return one_line(error)
    return "" if task.is_done else f"no answer within {SECONDS_WITH_NAMES:.0f} s"
