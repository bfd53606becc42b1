"""Each flag of `mlflow-dr validate` reaches its configuration."""

from operator import attrgetter

import pytest

from mlflow_dr.cli.options import from_flags
from mlflow_dr.cli.validate import validate_command
from mlflow_dr.errors import UsageError
from mlflow_dr.validation.config import ValidateConfig

FLAGS = {
    "--order bisect": ("order", "bisect"),
    "--every 7": ("every", 7),
    "--max-lag 60": ("max_lag_seconds", 60.0),
    "--max-seconds 90": ("max_seconds", 90.0),
    "--retry-failed": ("retry_failed", True),
    "--poll-seconds 5": ("poll_seconds", 5.0),
    "--once": ("follow", False),
    "--patience 3": ("patience", 3),
    "--min-delta 0.01": ("min_delta", 0.01),
    "--metric val/ndcg_at_10": ("metric", "val/ndcg_at_10"),
    "--pooling cls": ("encoder_changes", {"pooling": "cls"}),
    "--no-normalize": ("encoder_changes", {"normalize": False}),
    "--max-length 9": ("encoder_changes", {"query_max_length": 9, "passage_max_length": 9}),
}
OF_THE_VALIDATION = {
    "--name other": ("name", "other"),
    "--dataset demo": ("dataset", "demo"),
    "--split test": ("split", "test"),
    "--depth 200": ("settings.depth", 200),
    "--device cpu": ("settings.device", "cpu"),
    "--dtype fp32": ("settings.dtype", "fp32"),
    "--keep-own-id": ("settings.keep_own_id", True),
    "--subset bm25@5": ("subset.shown", "bm25@5"),
    "--subset random:5 --seed 3": ("subset.seed", 3),
    "--subset random:5 --judged all": ("subset.judged", "all"),
}


def planned(argv: list[str]) -> ValidateConfig:
    with validate_command.make_context("validate", argv) as context:
        values = dict(context.params)
    return from_flags(ValidateConfig, values, values.pop("config"))


@pytest.mark.parametrize("argv", FLAGS)
def test_a_flag_of_the_plan(argv: str) -> None:
    name, expected = FLAGS[argv]
    plan = planned(["--run-id", "0", *argv.split()])
    assert attrgetter(name)(plan) == expected
    assert attrgetter(name)(planned(["--run-id", "0"])) != expected


@pytest.mark.parametrize("argv", OF_THE_VALIDATION)
def test_a_flag_of_the_validation(argv: str) -> None:
    name, expected = OF_THE_VALIDATION[argv]
    (found,) = planned(["--run-id", "0", *argv.split()]).all_validations
    assert attrgetter(name)(found) == expected
    (plain,) = planned(["--run-id", "0"]).all_validations
    assert attrgetter(name)(plain) != expected


def test_flags_of_several_validations() -> None:
    argv = "--run-id 0 --subset random:5 random:9 --keep-up --keep best:2,last:1"
    plan = planned(argv.split())
    assert plan.keep_up
    assert plan.keep == "best:2,last:1"
    (cheap, dear) = planned(
        ["--run-id", "0", "--subset", "random:5", "--refine", "full@4", "--measures", "ndcg@5"]
    ).all_validations
    assert (cheap.refines, dear.refines.name, dear.refines.best) == (None, cheap.name, 4)
    assert str(dear.refines.measure) == "ndcg@5"


@pytest.mark.parametrize("flag", ["--poll-seconds", "--max-lag", "--max-seconds", "--min-delta"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_out_of_range_are_refused(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{flag} is {value}.*; expected a"):
        planned(["--run-id", "0", flag, value])
