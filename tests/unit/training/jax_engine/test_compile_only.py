"""What `--compile-only` says; compiled by libtpu where there is one."""

import importlib.util
import os
from pathlib import Path

import pytest

from mlflow_dr.errors import MissingExtraError, TrainingError, UsageError
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.train import compile_only

LIBRARY = os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")
FLAGS = ["--engine", "jax", "--train_n_passages", "1", "--normalize", "true"]


@pytest.mark.skipif(not LIBRARY, reason="libtpu is not installed")
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_a_step_is_compiled_for_tpus(folder: Path, saved: Path, cached: bool) -> None:
    flags = [*FLAGS, "--model", str(saved), "--dataset", str(folder)]
    flags += ["--compile_only", "v5e:2x2", "--bf16", "--per_device_train_batch_size", "16"]
    flags += ["--grad_cache", str(cached), "--gc_q_chunk_size", "4", "--gc_p_chunk_size", "4"]
    said = compile_only(parse_training(flags))
    assert said.startswith("v5e:2x2: 4 devices (TPU v5 lite)")
    assert "on each device: 16 queries of 32 tokens and 16 passages of 128 tokens" in said
    assert said.endswith(" GB of 17.18 GB: it fits")


@pytest.mark.skipif(not LIBRARY, reason="libtpu is not installed")
def test_a_step_that_is_too_large_names_a_chunk_that_fits(folder: Path, saved: Path) -> None:
    flags = [*FLAGS, "--model", str(saved), "--dataset", str(folder)]
    flags += ["--compile_only", "v5e:2x2", "--per_device_train_batch_size", "200000"]
    with pytest.raises(TrainingError, match=r"asks for .* of memory.*--gc_p_chunk_size \d+ would"):
        compile_only(parse_training(flags))


@pytest.mark.skipif(not LIBRARY, reason="libtpu is not installed")
def test_unknown_tpus_are_refused(folder: Path, saved: Path) -> None:
    flags = [*FLAGS, "--model", str(saved), "--dataset", str(folder), "--compile_only", "v9:1x1"]
    with pytest.raises(UsageError, match="libtpu knows no such TPUs"):
        compile_only(parse_training(flags))


@pytest.mark.skipif(bool(LIBRARY), reason="libtpu is installed")
def test_without_libtpu_one_line_says_how_to_install_it(folder: Path, saved: Path) -> None:
    flags = [*FLAGS, "--model", str(saved), "--dataset", str(folder), "--compile_only", "v5e:2x2"]
    with pytest.raises(MissingExtraError, match="pip install libtpu"):
        compile_only(parse_training(flags))
