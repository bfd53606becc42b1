"""At which steps checkpoints are published."""

import math
from collections.abc import Callable

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.callbacks import every_steps, publish_schedule
from mlflow_dr.training.parsing import parse_training


def steps(due: Callable[[int], bool], last: int) -> list[int]:
    return [step for step in range(1, last + 1) if due(step)]


def test_every_few_steps() -> None:
    assert steps(every_steps(3), 9) == [3, 6, 9]
    assert steps(every_steps(0), 9) == []


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_times_an_epoch_as_gc_dpr_counts(times: int) -> None:
    """Every ceil(steps / times) steps of an epoch, and at its end."""
    request = parse_training(["--publish_per_epoch", str(times), "--batch_size", "4"])
    due = publish_schedule(request, 41)
    epoch = math.ceil(41 / 4)
    every = math.ceil(epoch / times)
    expected = {n * epoch + step for n in (0, 1) for step in range(every, epoch, every)}
    assert set(steps(due, 2 * epoch)) == expected | {epoch, 2 * epoch}


def test_accumulated_and_dropped_batches() -> None:
    argv = ["--publish_per_epoch", "1", "--batch_size", "4"]
    more = ["--gradient_accumulation_steps", "3", "--dataloader_drop_last"]
    assert steps(publish_schedule(parse_training(argv), 41), 22) == [11, 22]
    assert steps(publish_schedule(parse_training([*argv, *more]), 41), 8) == [4, 8]


def test_the_users_steps_replace_the_recipes_epochs() -> None:
    recipe = ["--recipe", "dpr"]
    assert parse_training(recipe).publish.publish_per_epoch == 1
    request = parse_training([*recipe, "--publish_steps", "7"])
    assert steps(publish_schedule(request, 100), 20) == [7, 14]
    with pytest.raises(UsageError, match="--eval_per_epoch and --publish_steps exclude each other"):
        parse_training(["--eval_per_epoch", "2", "--publish_steps", "7"])
