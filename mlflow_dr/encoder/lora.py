"""Low-rank adapters: added, merged into plain weights, written alone, and read again.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; the layers are peft's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mlflow_dr.encoder.files import ADAPTER_CONFIG
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import (
    CheckpointError,
    MissingExtraError,
    UsageError,
    one_line,
    quoted,
)

WEIGHTS = "adapter_model.safetensors"
# attention and feed-forward in most decoders; other backbones get adapters on all linear layers
USUAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj")
ALL_LINEAR = "all-linear"
EXPRESSIONS = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern")
PLAIN_NAME = re.compile(r"\^?[\w.\\-]*\$?")
ADAPTED_LAYER = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
PRODUCT = (".lora_A.default.weight", ".lora_B.default.weight")


def add_lora(
    encoder: Encoder,
    base: str,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | None = None,
    start: str | Path | None = None,
    merged: bool = True,
) -> None:
    """Put adapters on an encoder's backbone and freeze the rest of it.

    Args:
        encoder: changed in place; an untied query encoder gets adapters of its own.
        base: the backbone's name or directory, which is written beside the adapters.
        rank: the inner dimension of the two matrices.
        alpha: their product is scaled by `alpha / rank`.
        dropout: on the adapters' input.
        targets: names of the layers; chosen by the kind of backbone when None.
        start: a directory of adapters to continue with; rank and the rest are then its own.
        merged: whether they will be saved merged.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: the backbone has no such layers, the adapters do not fit it, or they cannot be
            merged.
    """
    peft = _peft()
    for part in encoder.distinct_encoders:
        plain = set(part.backbone.state_dict())
        try:
            with _quiet_peft():
                if start is not None:
                    part.backbone = peft.PeftModel.from_pretrained(
                        part.backbone,
                        str(start),
                        is_trainable=True,
                        config=_checked_config(peft, Path(start)),
                    )
                else:
                    config = peft.LoraConfig(
                        r=rank,
                        lora_alpha=alpha,
                        lora_dropout=dropout,
                        target_modules=list(targets) if targets else _targets(part.backbone),
                    )
                    part.backbone = peft.get_peft_model(part.backbone, config)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"no adapters on {base}: {one_line(error)}") from error
        if merged and (more := _more_than_products(part.backbone, plain)):
            raise UsageError(
                f"{start or base}: the adapters have {more}, so they are not only products of two "
                "matrices and cannot be merged; publish them alone with `--lora_publish adapter`, "
                "or merge them with peft's `merge_and_unload` and start with that encoder"
            )
        part.backbone.peft_config["default"].base_model_name_or_path = base


def merged_weights(backbone: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A backbone without its adapters, and its weights with the adapters' products added.

    Args:
        backbone: with adapters.
        state: its weights, under `backbone.state_dict()`'s names.

    Returns:
        The bare backbone, whose own weights are unchanged, and the merged weights.
    """
    bare = backbone.get_base_model()
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        bare_name = name.removeprefix("base_model.model.")
        if ".lora_" in bare_name:
            continue
        if bare_name.endswith(".base_layer.weight"):
            layer = bare.get_submodule(bare_name.removesuffix(".base_layer.weight"))
            stem = name.removesuffix("base_layer.weight")
            a, b = (state[f"{stem}lora_{matrix}.default.weight"] for matrix in "AB")
            product = b.to(value.device).float() @ a.to(value.device).float()
            delta = product * layer.scaling["default"]
            value = value + (delta.T if layer.fan_in_fan_out else delta).to(value.dtype)
        plain[bare_name.replace(".base_layer.", ".")] = value
    return bare, plain


def save_adapter(directory: Path, backbone: Any, state: Mapping[str, Tensor]) -> None:
    """Write the adapters without their base, as peft and transformers read them."""
    # False, because "auto" makes peft ask the hub about the base's embeddings
    backbone.save_pretrained(str(directory), state_dict=dict(state), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card


def with_adapters(directory: Path, backbone: Any) -> Any:
    """A bare backbone with a directory's adapters merged into it.

    Raises:
        CheckpointError: the directory has no adapters in safetensors.
        MissingExtraError: peft is not installed.
    """
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory}: no {WEIGHTS}; adapters are only read as safetensors")
    peft = _peft()
    with _quiet_peft():
        config = _checked_config(peft, directory)
        adapted = peft.PeftModel.from_pretrained(backbone, str(directory), config=config)
        return adapted.merge_and_unload()


def restore_adapter(directory: Path, backbone: Any) -> None:
    """Read saved adapters back into a backbone that has adapters of the same shape."""
    _peft().set_peft_model_state_dict(backbone, load_file(directory / WEIGHTS))


def _checked_config(peft: Any, directory: Path) -> Any:
    """The description of adapters, without regular expressions from other people's files.

    peft matches an expression with the name of every layer, and a malicious one never ends. The
    layers that have adapters are taken from the file of weights instead.

    Raises:
        CheckpointError: a setting is a regular expression, and the weights do not replace it.
    """
    config = peft.PeftConfig.from_pretrained(str(directory))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != ALL_LINEAR:
        with safe_open(directory / WEIGHTS, "pt") as file:
            matches = (ADAPTED_LAYER.fullmatch(name) for name in list(file.keys()))
            config.target_modules = {match[1] for match in matches if match}
    for name in EXPRESSIONS:
        value: Any = getattr(config, name, None)
        parts = [value] if isinstance(value, str) else list(value or ())
        if wrong := [part for part in parts if not PLAIN_NAME.fullmatch(str(part))]:
            raise CheckpointError(
                f"{directory / ADAPTER_CONFIG}: {name} has the regular expression "
                f"{quoted(wrong[0])}; expected names of layers"
            )
    return config


def _more_than_products(backbone: Any, plain: Collection[str]) -> str | None:
    """The first part of a backbone's adapters that `merged_weights` would leave out.

    Args:
        backbone: with adapters.
        plain: the names of its weights without adapters.
    """
    for module in backbone.modules():
        if variant := getattr(module, "lora_variant", {}).get("default"):
            return type(variant).__name__
    for name, value in backbone.state_dict().items():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        is_product = plain_name.endswith(PRODUCT) and value.ndim == 2
        if not is_product and plain_name not in plain:
            return plain_name
    return None


def _targets(backbone: nn.Module) -> list[str] | str:
    last_names = {re.sub(r".*\.", "", name) for name, _ in backbone.named_modules()}
    usual = [name for name in USUAL_TARGETS if name in last_names]
    return usual or ALL_LINEAR


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's warnings about deprecated names and about GPT-2's layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            f"--lora and checkpoints of adapters need peft ({error}); pip install 'mlflow_dr[lora]'"
        ) from error
    return peft
