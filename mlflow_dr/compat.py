"""Private names of other libraries, each behind one function or in one table.

An upgrade may change such a name without notice; `tests/unit/test_compat.py` then fails and says
which library it was. Nothing heavy is imported here before it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

TRAINER_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_run_epoch": ("model", "epoch", "train_dataloader", "steps_in_epoch"),
}
"""transformers: the private methods that our trainer overrides -> their first parameters."""


def register_before_thread_pools_end(function: Callable[[], None]) -> None:
    """Python: have a function called at exit while thread pools still take work.

    `atexit` is too late: `concurrent.futures` ends its pools by `threading._register_atexit`. The
    functions registered there are called in reverse order, so ours must be registered after it.
    """
    import concurrent.futures.thread  # noqa: F401 - registers its own function

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]
    register(function)


def flag_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """argparse: the actions of a parser by each spelling of their flag."""
    return dict(parser._option_string_actions)


def use_one_gpu(arguments: Any) -> None:
    """transformers: keep Trainer from `nn.DataParallel`, which would split the batch."""
    arguments._n_gpu = 1


def loss_progress(trainer: Any) -> tuple[Any, float, int]:
    """transformers: the sums of losses that Trainer does not save in a checkpoint.

    Returns:
        The sum since the last log, a tensor on the device; the sum until the last log; the step of
        the last log.
    """
    return trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged


def set_loss_progress(trainer: Any, loss: float, total: float, logged: int) -> None:
    """transformers: set what `loss_progress` gives, after Trainer has set it to 0."""
    trainer._tr_loss.fill_(loss)
    trainer._total_loss_scalar = total
    trainer._globalstep_last_logged = logged


def uncompiled(model: Any) -> Any:
    """torch: the module that `torch.compile` has wrapped; the model itself if it is not wrapped."""
    return getattr(model, "_orig_mod", model)


def has_adapters(module: Any) -> bool:
    """transformers and peft: whether a module has adapters that are not merged."""
    return bool(getattr(module, "_hf_peft_config_loaded", False)) or hasattr(
        module, "merge_and_unload"
    )


def is_sharded(weight: Any) -> bool:
    """torch and DeepSpeed: whether a process has only a part of a weight (FSDP, ZeRO-3)."""
    return hasattr(weight, "ds_id") or hasattr(weight, "full_tensor")


def processor_has_bf16() -> bool:
    """torch: whether the processor multiplies bf16 matrices natively."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
