"""Flags of `--engine jax`, and what is said where JAX is missing; nothing here imports JAX."""

import importlib.util
from pathlib import Path

import pytest
from forks import Forks

from mlflow_dr.errors import MissingExtraError, UsageError
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.train import trainer_kind
from mlflow_dr.training.trainer import RetrieverTrainer

JAX = ["--engine", "jax"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "full_shard"], "does not have --fsdp"),
        (["--lora"], "does not have --lora"),
        (["--fp16"], "does not have --fp16; use --bf16"),
        (["--optim", "adafactor"], "does not have --optim adafactor"),
        (["--torch_compile"], "does not have --torch_compile"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_jax_does_not_have_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_training([*JAX, *flags])


def test_several_processes_on_a_host_are_refused() -> None:
    with pytest.raises(UsageError, match="by one process; leave --gpus out"):
        parse_training(JAX, processes=2)


@pytest.mark.parametrize("flag", ["--coordinator", "--compile-only"])
def test_flags_of_jax_need_the_engine(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} needs --engine jax"):
        parse_training([flag, "v5e:2x2"])


def test_torchs_part_stays_on_the_processor() -> None:
    """What the processor can do says nothing on bf16 on a TPU."""
    request = parse_training(JAX)
    assert request.trainer.use_cpu
    assert not request.trainer.bf16
    assert parse_training([*JAX, "--bf16"]).trainer.bf16


def test_without_jax_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "jax" else find(name, *rest),
    )
    with pytest.raises(MissingExtraError, match=r'pip install "mlflow_dr\[jax\]"'):
        trainer_kind(parse_training(JAX))
    assert trainer_kind(parse_training([])) is RetrieverTrainer


def test_training_by_torch_imports_no_jax(forks: Forks, tmp_path: Path) -> None:
    code = "import sys, mlflow_dr.cli.train, mlflow_dr.training.train; print('jax' in sys.modules)"
    done = forks.call("python", "-c", code, variables={}, directory=tmp_path)
    assert done.stdout.strip() == "False", done.stderr[-2000:]
