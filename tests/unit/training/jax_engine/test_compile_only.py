"""What `--compile-only` says; compiled by libtpu where there is one."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

from mlflow_dr.errors import MissingExtraError
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.train import compile_only

Make = Callable[..., Any]
LIBRARY = os.environ.get("TPU_LIBRARY_PATH")
HAS_LIBRARY = bool(LIBRARY or importlib.util.find_spec("libtpu"))
with_library = pytest.mark.skipif(not HAS_LIBRARY, reason="libtpu is not installed")


@pytest.fixture
def flags(folder: Path, saved: Path) -> list[str]:
    given = {
        "engine": "jax",
        "model": saved,
        "dataset": folder,
        "compile_only": "v5e:2x2",
        "train_n_passages": 1,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


@pytest.fixture
def call(flags: list[str], forks: Forks, tmp_path: Path) -> Make:
    """A function from more flags to the command, in a process without flags of XLA.

    libtpu ends the process if it does not know one of them.
    """

    def call(*more: str) -> Any:
        variables = {"XLA_FLAGS": "", **({"TPU_LIBRARY_PATH": LIBRARY} if LIBRARY else {})}
        return forks.call(
            "mlflow-dr", "train", *flags, *more, variables=variables, directory=tmp_path
        )

    return call


@with_library
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_a_step_is_compiled_for_tpus(call: Make, cached: bool) -> None:
    cache = ["--grad_cache", "--gc_q_chunk_size", "4", "--gc_p_chunk_size", "4"] if cached else []
    done = call("--bf16", "--per_device_train_batch_size", "16", *cache)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("v5e:2x2: 4 devices (TPU v5 lite)")
    assert "each device: 16 queries of 32 tokens and 16 passages of 128 tokens" in done.stdout
    assert done.stdout.rstrip().endswith(" GB of 17.18 GB: it fits")


@with_library
def test_unknown_tpus_are_refused(call: Make) -> None:
    done = call("--compile_only", "v9:1x1")
    assert done.returncode == 2
    assert "libtpu knows no such TPUs; expected a name such as v5e:2x4" in done.stderr


@pytest.mark.skipif(HAS_LIBRARY, reason="libtpu is installed")
def test_without_libtpu_one_line_says_how_to_install_it(flags: list[str]) -> None:
    with pytest.raises(MissingExtraError, match="pip install libtpu"):
        compile_only(parse_training(flags))
