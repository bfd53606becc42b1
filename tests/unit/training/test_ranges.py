"""Numbers that are refused before training begins."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.arguments import (
    DataArguments,
    EngineArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
)
from mlflow_dr.training.flags import CHOICES, RANGES, check_values, numbers_of, upsample_rates
from mlflow_dr.training.gc_dpr import GcDprArguments
from mlflow_dr.training.parsing import parse_training

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("learning_rate", (NAN, INF, -1e-5), (0.0, 1e-5)),
        ("weight_decay", (NAN, INF, -0.1), (0.0, 0.1)),
        ("adam_beta1", (NAN, -0.1, 1.0, 1.5), (0.0, 0.9)),
        ("adam_beta2", (NAN, -0.1, 1.0), (0.999,)),
        ("adam_epsilon", (NAN, 0.0, -1e-8, INF), (1e-8,)),
        ("max_grad_norm", (NAN, -1.0, INF), (0.0, 1.0)),
        ("num_train_epochs", (NAN, 0.0, -1.0, INF), (0.5, 3.0)),
        ("max_steps", (0, -2, 2**31), (-1, 1)),
        ("warmup_steps", (NAN, -1.0, INF), (0.0, 0.1, 1000.0)),
        ("logging_steps", (NAN, 0.0, -1.0), (0.1, 10.0)),
        ("save_steps", (0.0, -1.0), (1.0,)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
        ("data_seed", (-1, 2**32), (0,)),
        ("per_device_train_batch_size", (0, -1), (1,)),
        ("gradient_accumulation_steps", (0, -1), (1,)),
        ("temperature", (NAN, 0.0, -1.0, INF), (0.01,)),
        ("distil_weight", (NAN, -0.1, 1.1), (0.0, 1.0)),
        ("distil_temperature", (NAN, 0.0, INF), (0.02,)),
        ("train_n_passages", (0, -1), (1,)),
        ("q_max_len", (0, -1, 2), (3,)),
        ("p_max_len", (0, -1, 2), (3,)),
        ("sequence_length", (0, 2), (3,)),
        ("publish_steps", (-1,), (0, 1)),
        ("publish_per_epoch", (0, -1), (1,)),
        ("lora_r", (0, -1), (1,)),
        ("lora_alpha", (0, -1), (1,)),
        ("lora_dropout", (NAN, -0.1, 1.0), (0.0, 0.1)),
        ("dropout", (NAN, -0.1, 1.0), (0.0, 0.1)),
        ("hard_negatives", (-1,), (0, 1)),
    ],
)
def test_ranges(name: str, bad: tuple[float, ...], good: tuple[float, ...]) -> None:
    for value in bad:
        with pytest.raises(UsageError, match=f"^{name} is .*; it must be ") as caught:
            check_values({name: value})
        assert len(str(caught.value)) < 200
    for value in (*good, None):
        check_values({name: value})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rate", "nan"], "learning-rate is nan; it must be at least 0"),
        (["--learning_rate=-1"], "learning_rate is -1.0; it must be at least 0"),
        (["--batch_size", "0"], "batch_size: per_device_train_batch_size is 0; it must be at"),
        (["--eval-per-epoch", "0"], "eval-per-epoch: publish_per_epoch is 0; it must be at"),
        (["--query_max_len", "0"], "query_max_len: q_max_len is 0; it must be at least 3"),
        (["--seed", "9" * 3000], "seed is too large; it must be at most 4294967295"),
        (["--train_files_upsample_rates", "[1,0]"], "expected whole numbers above 0"),
        (["--adam_betas", "(0.9, 1)"], "adam_betas: adam_beta2 is 1.0; it must be at least 0"),
    ],
)
def test_the_flag_is_named_as_it_was_typed(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_training(argv)
    assert message in str(caught.value)


def test_a_number_of_thousands_of_digits_is_a_short_line() -> None:
    with pytest.raises(UsageError, match="--seed") as caught:
        parse_training(["--seed", "9" * 5000])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate: .nan", "learning_rate is nan; it must be at least 0"),
        ("batch_size: 0", "batch_size: per_device_train_batch_size is 0"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
    ],
)
def test_values_of_a_file_are_refused_with_the_file(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse_training(["--config", str(file)])
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_values_from_python_are_checked_too() -> None:
    good = parse_training(["--use_cpu"])
    for part, values, message in (
        ("trainer", RetrieverTrainingArguments(learning_rate=NAN), "learning_rate is nan"),
        ("data", DataArguments(q_max_len=0), "q_max_len is 0; it must be at least 3"),
        ("data", DataArguments(train_files_upsample_rates="[0]"), "expected whole numbers above 0"),
        ("model", ModelArguments(pooling="middle"), "pooling is 'middle'"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(good, **{part: values})


def test_every_range_and_choice_belongs_to_a_flag() -> None:
    kinds = (
        ModelArguments,
        LossArguments,
        DataArguments,
        PublishArguments,
        GcDprArguments,
        RetrieverTrainingArguments,
        EngineArguments,
    )
    ranged = {name for _, names in RANGES.values() for name in names}
    assert {*ranged, *CHOICES} <= {field.name for kind in kinds for field in fields(kind)}


def test_lists_of_numbers() -> None:
    for text in ("[1, 2]", "(1,2)", "1,2", " [1.0, 2]"):
        assert upsample_rates(text) == [1, 2]
    assert upsample_rates(None) == []
    assert upsample_rates("3") == [3]
    for text in ("", "[1,", "a", "[[1]]", "[1.5]", "[-1]", "[]", "[None]", "9" * 5000, "[" * 9999):
        with pytest.raises(UsageError, match=r"^--train_files_upsample_rates is ") as caught:
            upsample_rates(text)
        assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match=r"--x is 'a'; expected numbers, such as \[1\]"):
        numbers_of("a", "--x", "[1]")
