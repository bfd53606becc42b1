"""`forked_commands.py` for training: places at which a training ends itself.

A place is a name and a number, `step-3`: the third time that it is come by.
"""

import forked_commands
import git  # noqa: F401 - what training imports late
from forked_commands import Wrapper, after, before
from mlflow.store.tracking import sqlalchemy_store  # noqa: F401

from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training import publishing, train, trainer
from mlflow_dr.training.loss import Objective

TIMES = range(1, 9)


def nth(number: int, wrapper: Wrapper) -> Wrapper:
    """A wrapper that dies the n-th time."""

    def nth_time(function, die):  # type: ignore[no-untyped-def]
        times = []

        def die_then() -> None:
            times.append(1)
            if len(times) == number:
                die()

        return wrapper(function, die_then)

    return nth_time


PLACES = {
    "step": (Objective, "__call__", before),
    "saving": (trainer, "save_encoder", after),
    "marking": (trainer, "mark_whole", before),
    "marked": (trainer, "mark_whole", after),
    "rotating": (trainer, "rotate_checkpoints", before),
    "uploading": (publishing, "upload_checkpoint", before),
    "uploaded": (publishing, "upload_checkpoint", after),
    "beginning": (train, "_describe", after),
    "finishing": (TrackedRun, "finish", before),
}

if __name__ == "__main__":
    for name, (owner, function, wrapper) in PLACES.items():
        for number in TIMES:
            place = (owner, function, nth(number, wrapper))
            forked_commands.PLACES[f"{name}-{number}"] = place
    forked_commands.main()
