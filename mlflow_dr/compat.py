"""Private names of other libraries, each behind one function or in one table.

An upgrade may change such a name without notice; `tests/unit/test_compat.py` then fails and says
which library it was. Nothing heavy is imported here before it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

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
JAX_TRAINER_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "_wrap_model": ("model",),
    "_clip_grad_norm": ("model",),
    "_get_grad_norm": ("model", "grad_norm"),
}
"""transformers: those that the trainer of `--engine jax` overrides, too."""
ABANDONED_POOL = "_cuda_endAllocateToPool", "_cuda_releasePool"
"""torch.cuda.memory: what ends the use of a memory pool; of a device's number and a pool."""


def register_before_thread_pools_end(function: Callable[[], None]) -> None:
    """Python: have a function called at exit while thread pools still take work.

    `atexit` is too late: `concurrent.futures` ends its pools by `threading._register_atexit`. The
    functions registered there are called in reverse order, so ours must be registered after it.
    """
    import concurrent.futures.thread  # noqa: F401 - registers its own function

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]
    register(function)


def is_generated_name(name_utils: Any, name: str) -> bool:
    """mlflow: whether it has made up the name of a run, such as `tasteful-stoat-947`.

    Args:
        name_utils: mlflow's module of that name.
        name: of the run.
    """
    first, _, rest = name.partition("-")
    noun, _, number = rest.rpartition("-")
    is_made_of = first in name_utils._GENERATOR_PREDICATES and noun in name_utils._GENERATOR_NOUNS
    return is_made_of and number.isdecimal()


def flag_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """argparse: the actions of a parser by each spelling of their flag."""
    return dict(parser._option_string_actions)


ATTENTIONS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
"""transformers: what a class of models says about the attention that it can use."""


def with_attention_of_backbone(kind: Any) -> Any:
    """transformers: let a class of models use any attention; its backbone checks which it has."""
    for name in ATTENTIONS:
        setattr(kind, name, True)
    return kind


def use_devices(arguments: Any, count: int) -> None:
    """transformers: say how many devices a process uses; its batch is that many times as large.

    With more than one, Trainer wraps the model in `nn.DataParallel`, unless it is wrapped already.
    """
    arguments._n_gpu = count


def find_processes(arguments: Any) -> None:
    """transformers: have arguments find the processes again, after their variables were set."""
    vars(arguments).pop("_setup_devices", None)
    arguments.device  # noqa: B018 - a property that sets up the processes


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """transformers: an attention that backbones can be set to; it gets no mask."""
    from transformers import AttentionInterface

    # one without a mask function has no mask, and nothing is asked of the device to find out
    AttentionInterface.register(name, attention)


@contextmanager
def attention_set(config: Any, name: str) -> Iterator[None]:
    """transformers: compute with an attention of this name, and with the one before afterwards."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def abandon_capture(graph: Any, device: Any, memory: Any) -> None:
    """torch: end a capture of a CUDA graph that has failed.

    If CUDA refuses to end it, its memory pool stays open, and nothing that another stream has used
    would ever be free again. Else the graph releases the pool by itself.

    Args:
        graph: what was captured.
        device: where.
        memory: the pool of the graph.
    """
    import torch

    with suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # raises if the capture has not ended
    except RuntimeError:
        for end in ABANDONED_POOL:
            getattr(torch.cuda.memory, end)(device.index or 0, memory)


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


MLFLOW_OVERRIDES = ("create_run", "get_run", "create_logged_model", "get_logged_model")
"""mlflow: methods of the private `TrackingServiceClient` that our client overrides."""

SENTENCE_TRANSFORMERS_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "_load_config": ("model_name_or_path", "backend", "config_kwargs"),
    "_load_model": (
        *("model_name_or_path", "transformer_task", "config"),
        *("backend", "is_peft_model"),
    ),
}
"""sentence-transformers: the private methods of `Transformer` that our backbone overrides."""


def set_service_client(client: Any, service: Any) -> None:
    """mlflow: replace the client below a `MlflowClient`."""
    client._tracking_client = service


def service_client(client: Any) -> Any:
    """mlflow: the client below a `MlflowClient`; the client itself if there is none."""
    return getattr(client, "_tracking_client", client)


def artifact_store(client: Any, run_id: str) -> Any:
    """mlflow: the artifact store of a run."""
    return client._tracking_client._get_artifact_repo(run_id)


def download_file(store: Any, name: str, path: str) -> None:
    """mlflow: download one file of an artifact store, without the retries of the public method."""
    store._download_file(name, path)


def dataset_entity(dataset: Any) -> Any:
    """mlflow: a dataset as `MlflowClient.log_inputs` takes it."""
    return dataset._to_mlflow_entity()


def load_with_module_classes(kind: Any, directory: str, classes: Any, **options: Any) -> Any:
    """sentence-transformers: load a model, with other classes for some of its modules."""
    return kind._load_with_module_classes(directory, classes, **options)


def text_route(router: Any, task: str) -> Any:
    """sentence-transformers: the name of a router's route for the texts of a task."""
    return router._resolve_route(task=task, modality="text")


def processor_instructions_for_bf16() -> tuple[bool, bool]:
    """torch: whether the processor has AMX, and whether it has AVX512-BF16."""
    import torch

    return torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()


def processor_has_avx512() -> bool:
    """torch: whether the processor has AVX512."""
    import torch

    return torch.cpu._is_avx512_supported()


def onednn_linear(layer: Any, n_rows: int, *, has_gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """torch: a linear layer computed by oneDNN, from a copy of its weight in oneDNN's order.

    Args:
        layer: an `nn.Linear` on a processor, fp32 or bf16.
        n_rows: about how many rows are computed at once.
        has_gelu: whether an exact GELU is applied to what comes out.
    """
    import torch

    operators = torch.ops.mkldnn
    weight = operators._reorder_linear_weight(layer.weight.detach(), n_rows)
    bias = None if layer.bias is None else layer.bias.detach()
    last: tuple[str, list[float], str] = ("gelu", [], "none") if has_gelu else ("none", [], "")

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = operators._linear_pointwise(inputs, weight, bias, *last)
        return outputs

    return forward


def onednn_product(left: Tensor, right: Tensor, added: Tensor | None = None) -> Tensor:
    """torch: all dot products of rows, computed by oneDNN; nothing has a gradient.

    Args:
        left: `(..., n, dim)` on a processor.
        right: `(m, dim)`.
        added: to each row of the result, `(m,)`.

    Returns:
        `(..., n, m)`, of the same number format.
    """
    import torch

    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, added, "none", [], "")
    return product
