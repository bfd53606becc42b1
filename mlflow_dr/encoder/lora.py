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
from torch import Tensor, nn

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.source import encoder_directory
from mlflow_dr.errors import CheckpointError, MissingExtraError, UnavailableError, UsageError

CONFIG = "adapter_config.json"
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
        encoder: changed in place; with a query tower, that tower gets adapters of its own.
        base: the name that the backbone is found by again, written beside the adapters.
        rank: of the two matrices.
        alpha: their product is scaled by `alpha / rank`.
        dropout: on the adapters' input.
        targets: names of the layers; by the kind of backbone when None.
        start: a directory of adapters to go on with; rank and the rest are then its own.
        merged: whether they will be saved merged.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: the backbone has no such layers, or the adapters do not fit it, or are of a kind
            that cannot be saved merged.
    """
    peft = _peft()
    for one in encoder.towers:
        plain = set(one.backbone.state_dict())
        try:
            with _quiet_peft():
                if start is not None:
                    one.backbone = peft.PeftModel.from_pretrained(
                        one.backbone,
                        str(start),
                        is_trainable=True,
                        config=_checked_config(peft, Path(start)),
                    )
                else:
                    config = peft.LoraConfig(
                        r=rank,
                        lora_alpha=alpha,
                        lora_dropout=dropout,
                        target_modules=list(targets) if targets else _targets(one.backbone),
                    )
                    one.backbone = peft.get_peft_model(one.backbone, config)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"no adapters on {base}: {reason}") from error
        if merged and (more := _more_than_products(one.backbone, plain)):
            raise UsageError(
                f"{start or base}: the adapters have {more}, so they are more than products of two "
                "matrices and cannot be published merged; `--lora_publish adapter` publishes them "
                "alone, or merge them with peft's `merge_and_unload` and begin with that encoder"
            )
        one.backbone.peft_config["default"].base_model_name_or_path = base


def is_adapted(backbone: Any) -> bool:
    """Whether a backbone has adapters."""
    return hasattr(backbone, "peft_config") and hasattr(backbone, "get_base_model")


def merged_weights(backbone: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A backbone with adapters as if it never had any.

    Args:
        backbone: with adapters.
        state: its weights, under `backbone.state_dict()`'s names.

    Returns:
        The bare backbone, for its configuration, and its weights with each adapter's product added.
    """
    bare = backbone.get_base_model()
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        place = name.removeprefix("base_model.model.")
        if ".lora_" in place:
            continue
        if place.endswith(".base_layer.weight"):
            layer = bare.get_submodule(place.removesuffix(".base_layer.weight"))
            stem = name.removesuffix("base_layer.weight")
            down, up = (state[f"{stem}lora_{one}.default.weight"] for one in "AB")
            delta = (up.to(value.device).float() @ down.to(value.device).float()) * layer.scaling[
                "default"
            ]
            value = value + (delta.T if layer.fan_in_fan_out else delta).to(value.dtype)
        plain[place.replace(".base_layer.", ".")] = value
    return bare, plain


def save_adapter(directory: Path, backbone: Any, state: Mapping[str, Tensor]) -> None:
    """Write the adapters alone, as peft and transformers read them."""
    # the base has its embeddings; left to decide, peft would ask the hub about them
    backbone.save_pretrained(str(directory), state_dict=dict(state), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card


def base_of(directory: Path) -> str | None:
    """The name of the backbone that a directory's adapters belong to; None without adapters.

    Raises:
        CheckpointError: the description cannot be read or names no backbone.
    """
    import json

    path = directory / CONFIG
    if not path.exists():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an adapter's description ({error})") from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path}: names no backbone (base_model_name_or_path)")
    return base


def adapter_chain(directory: Path, cache_dir: str | None = None) -> list[Path]:
    """The directories of adapters that lie on one another, the outermost first, then their base.

    Args:
        directory: with adapters, or the base itself.
        cache_dir: where files from the hub are kept; Hugging Face's own cache when None.

    Raises:
        UnavailableError: a base that cannot be had on this machine.
        CheckpointError: adapters that are based on themselves.
    """
    chain = [directory]
    while (base := base_of(chain[-1])) is not None:
        try:
            place = encoder_directory(base, cache_dir)
        except UsageError as error:
            raise UnavailableError(
                f"{chain[-1]} has adapters of another backbone: {error}"
            ) from error
        if any(place.resolve() == known.resolve() for known in chain):
            raise CheckpointError(
                f"{chain[-1] / CONFIG}: base_model_name_or_path {base!r:.120} leads back to "
                "adapters that are based on it"
            )
        chain.append(place)
    return chain


def with_adapters(directory: Path, backbone: Any) -> Any:
    """A bare backbone with a directory's adapters merged into it.

    Raises:
        CheckpointError: the adapters are not there as safetensors, or do not fit.
        MissingExtraError: peft is not installed.
    """
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory}: no {WEIGHTS}; adapters are read as safetensors only")
    peft = _peft()
    try:
        with _quiet_peft():
            config = _checked_config(peft, directory)
            adapted = peft.PeftModel.from_pretrained(backbone, str(directory), config=config)
            return adapted.merge_and_unload()
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: adapters that do not fit: {reason}") from error


def _checked_config(peft: Any, directory: Path) -> Any:
    """The description of adapters, without regular expressions from elsewhere.

    peft matches them with the name of every layer; one that is made for it takes for ever. The
    layers are those that the file of weights names.

    Raises:
        CheckpointError: an expression that the weights do not stand for.
    """
    config = peft.PeftConfig.from_pretrained(str(directory))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != ALL_LINEAR:
        with safe_open(directory / WEIGHTS, "pt") as file:
            found = (ADAPTED_LAYER.fullmatch(name) for name in list(file.keys()))
            config.target_modules = {match[1] for match in found if match}
    said: dict[str, Any] = {name: getattr(config, name, None) for name in EXPRESSIONS}
    for name, value in said.items():
        parts = [value] if isinstance(value, str) else list(value or ())
        if wrong := [part for part in parts if not PLAIN_NAME.fullmatch(str(part))]:
            raise CheckpointError(
                f"{directory / CONFIG}: {name} has the regular expression {wrong[0]!r:.80}; "
                "expected names of layers"
            )
    return config


def restore_adapter(directory: Path, backbone: Any) -> None:
    """Read saved adapters back into a backbone that has adapters of the same shape.

    Raises:
        CheckpointError: they are not there, or of another shape.
    """
    from safetensors.torch import load_file

    try:
        _peft().set_peft_model_state_dict(backbone, load_file(directory / WEIGHTS))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: adapters that do not fit: {reason}") from error


def _more_than_products(backbone: Any, plain: Collection[str]) -> str | None:
    """The first thing in a backbone with adapters that `merged_weights` would leave out.

    Args:
        backbone: with adapters.
        plain: the names of its weights without.
    """
    for module in backbone.modules():
        if variant := getattr(module, "lora_variant", {}).get("default"):
            return type(variant).__name__
    for name, value in backbone.state_dict().items():
        place = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        is_product = place.endswith(PRODUCT) and value.ndim == 2
        if not is_product and place not in plain:
            return place
    return None


def _targets(backbone: nn.Module) -> list[str] | str:
    last_names = {re.sub(r".*\.", "", name) for name, _ in backbone.named_modules()}
    usual = [name for name in USUAL_TARGETS if name in last_names]
    return usual or ALL_LINEAR


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without notes to peft's authors on names that they still use, and on GPT-2's layers."""
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
