"""The encoder's directory, which `mlflow_dr`, sentence-transformers and AutoModel all load.

config.json, model.safetensors, tokenizer*      the backbone, for AutoModel
modules.json, 1_Pooling/, 2_Dense/, ...         the rest, for sentence-transformers
mlflow_dr.json                                  everything, for mlflow_dr
query/                                          the queries' tower, where they have their own
adapter_config.json, adapter_model.safetensors  instead of the backbone: adapters of another one
"""

from __future__ import annotations

import inspect
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlflow_dr.encoder import lora
from mlflow_dr.encoder import sentence_transformers as st
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder, positions
from mlflow_dr.encoder.quiet import quiet_transformers
from mlflow_dr.encoder.source import encoder_directory
from mlflow_dr.encoder.tokenize import highest_id
from mlflow_dr.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)

CONFIG = "mlflow_dr.json"
QUERY_TOWER = "query"
LAYOUT = 1
ENCODERS_OF_PAIRS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
LONGEST_BY_DEFAULT = 512
# without its files transformers makes up a tokenizer of special tokens and, by kind, up to 2 others
MADE_UP_TOKENS = 2


def load_encoder(
    name: str | Path,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
    safetensors_only: bool = False,
    tokenizer: str | None = None,
    cache_dir: str | None = None,
    bare_pooling: str | None = None,
    **changes: Any,
) -> Encoder:
    """An encoder from a directory of any of the three kinds, or from a name on the hub.

    Args:
        name: our directory, sentence-transformers', a bare backbone's, or a hub name.
        attention: transformers' `attn_implementation`.
        trust_remote_code: whether code in the directory may run; never by default.
        safetensors_only: refuse weights in any other format.
        tokenizer: a directory or hub name whose tokenizer is taken instead.
        cache_dir: where files from the hub are kept; Hugging Face's own cache when None.
        bare_pooling: the pooling of a backbone whose directory names none; `mean` when None.
        changes: fields of `EncoderConfig` that replace what the directory says.

    Returns:
        The encoder in fp32 on the CPU, in evaluation mode.

    Raises:
        UsageError: there is no such encoder.
        CheckpointError: its files are damaged, missing or of a kind that is not known.
    """
    directory = encoder_directory(str(name), cache_dir)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention:
        options["attn_implementation"] = attention
    if safetensors_only:
        options["use_safetensors"] = True
    is_ours = (directory / CONFIG).exists()
    is_theirs = not is_ours and st.is_sentence_transformer(directory)
    place = st.transformer_directory(directory) if is_theirs else directory
    words = encoder_directory(tokenizer, cache_dir) if tokenizer else place
    backbone, loaded = _load_adapted(place, words, options, cache_dir)
    longest = _longest(backbone, loaded)
    if not is_ours and not is_theirs and "pooling" not in changes:
        changes = {"pooling": bare_pooling or "mean", **changes}
        log.warning("%s is a bare backbone: taking %s pooling", name, changes["pooling"])
    config, weights = _described(directory, is_theirs, longest)
    encoder = _made(directory, backbone, loaded, config, changes)
    _load_projections(encoder, weights, safetensors_only)
    if is_ours and (directory / QUERY_TOWER).is_dir():
        encoder.query_tower = load_encoder(
            directory / QUERY_TOWER,
            attention=attention,
            trust_remote_code=trust_remote_code,
            safetensors_only=safetensors_only,
            tokenizer=tokenizer,
            cache_dir=cache_dir,
            **changes,
        )
    return encoder.eval()


def _made(
    directory: Path, backbone: Any, tokenizer: Any, config: EncoderConfig, changes: dict[str, Any]
) -> Encoder:
    """An encoder of these parts; what does not fit is the user's error where the user says it."""
    try:
        return Encoder(backbone, tokenizer, replace(config, **changes))
    except UsageError as error:
        if changes:
            raise
        raise CheckpointError(f"{directory}: {error}") from error


def _described(directory: Path, is_theirs: bool, longest: int) -> tuple[EncoderConfig, list[Path]]:
    """What a directory says of its encoder, and where the weights of its projections are."""
    if (directory / CONFIG).exists():
        config = _read_config(directory)
        return config, [directory / f"{i + 2}_Dense" for i in range(len(config.projections))]
    if is_theirs:
        return st.read_config(directory, longest)
    return EncoderConfig("mean", query_max_length=longest, passage_max_length=longest), []


def save_encoder(
    directory: Path,
    encoder: Encoder,
    state: Mapping[str, Tensor] | None = None,
    merged: bool = True,
    for_queries: bool = False,
) -> None:
    """Write an encoder so that all three loaders read it.

    Args:
        directory: does not exist yet.
        encoder: what to write.
        state: weights to write instead of the encoder's own, under `encoder.state_dict()`'s names
            (a snapshot, while training goes on).
        merged: whether adapters become part of the backbone's weights; else they are written alone.
        for_queries: whether it is a tower of queries, which sentence-transformers cuts at their
            length; it cuts all others at the passages'.
    """
    state = state if state is not None else encoder.state_dict()
    directory.mkdir(parents=True)
    backbone, backbone_state = encoder.backbone, _under("backbone.", state)
    with quiet_transformers():
        if lora.is_adapted(backbone) and not merged:
            lora.save_adapter(directory, backbone, backbone_state)
        else:
            if lora.is_adapted(backbone):
                backbone, backbone_state = lora.merged_weights(backbone, backbone_state)
            backbone.save_pretrained(directory, state_dict=backbone_state)
    encoder.tokenizer.save_pretrained(directory)
    width = int(encoder.backbone.config.hidden_size)
    settings = encoder.settings
    length = settings.query_max_length if for_queries else settings.passage_max_length
    for index, place in enumerate(st.write_config(directory, settings, width, length)):
        prefix = f"projections.{index}."
        layer = {
            f"linear.{key.removeprefix(prefix)}": value.contiguous()
            for key, value in state.items()
            if key.startswith(prefix)
        }
        save_file(layer, place / "model.safetensors", metadata={"format": "pt"})
    values = {"layout": LAYOUT, "encoder": settings.to_dict()}
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if encoder.query_tower is not None:
        tower_state = _under("query_tower.", state)
        save_encoder(directory / QUERY_TOWER, encoder.query_tower, tower_state, merged, True)
        st.write_router(directory, QUERY_TOWER)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that belongs to one module, under the names it has there."""
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _read_config(directory: Path) -> EncoderConfig:
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        layout = values["layout"]
        if layout > LAYOUT:
            raise CheckpointError(
                f"{path}: layout {layout} was written by a newer mlflow_dr; this one reads {LAYOUT}"
            )
        return EncoderConfig.from_dict(values["encoder"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path}: not an encoder's description ({error})") from error


def _load_adapted(
    directory: Path, words: Path, options: dict[str, Any], cache_dir: str | None
) -> tuple[Any, Any]:
    """A backbone and a tokenizer, the backbone with its adapters merged where it has some."""
    base = lora.base_of(directory)
    if base is None:
        return _load_backbone(directory, words, options)
    try:
        place = encoder_directory(base, cache_dir)
    except UsageError as error:
        raise CheckpointError(f"{directory} has adapters of another backbone: {error}") from error
    if st.is_sentence_transformer(place):
        place = st.transformer_directory(place)
    backbone, tokenizer = _load_adapted(place, words, options, cache_dir)
    with quiet_transformers():
        return lora.with_adapters(directory, backbone), tokenizer


def _load_backbone(directory: Path, words: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    trust = {"trust_remote_code": options["trust_remote_code"]}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **trust)
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, **trust)
        kind = getattr(transformers, ENCODERS_OF_PAIRS.get(config.model_type, "AutoModel"))
        if _has_unused_pooler(config):
            options = {**options, "add_pooling_layer": False}
        with quiet_transformers():
            backbone, loading = kind.from_pretrained(
                directory, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{directory}: the pickled weights are damaged or hold more than weights, and no code "
            "of theirs is run; save them as safetensors"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: the backbone cannot be loaded: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{directory}: {len(missing)} weights of the backbone are not in the file, such as "
            f"{missing[0]}; is it a checkpoint of this architecture ({config.model_type})?"
        )
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) <= MADE_UP_TOKENS:
        raise CheckpointError(
            f"{words}: the tokenizer has special tokens only; are its files (tokenizer.json, "
            "vocab.txt or others) missing?"
        )
    rows = backbone.get_input_embeddings().weight.shape[0]
    if (highest := highest_id(tokenizer)) >= rows:
        raise CheckpointError(
            f"{words}: the tokenizer has token ids up to {highest}, but the backbone embeds "
            f"only {rows} tokens; tokenizer and weights do not belong together"
        )
    return backbone, tokenizer


def _has_unused_pooler(config: Any) -> bool:
    """Whether AutoModel would add BERT's pooler, whose weights no vector here depends on."""
    from transformers import AutoModel

    kind = AutoModel._model_mapping.get(type(config), None)
    return isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters


def _longest(backbone: Any, tokenizer: Any) -> int:
    limits = [tokenizer.model_max_length, positions(backbone.config)]
    known = [int(limit) for limit in limits if limit and limit < 1_000_000]
    return min(known, default=LONGEST_BY_DEFAULT)


def _load_projections(encoder: Encoder, places: list[Path], safetensors_only: bool) -> None:
    for layer, place in zip(encoder.projections, places, strict=False):
        state = _tensors(place, safetensors_only)
        try:
            layer.load_state_dict({k.removeprefix("linear."): v for k, v in state.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{place}: weights do not fit config.json: {reason}") from error


def _tensors(place: Path, safetensors_only: bool) -> dict[str, Tensor]:
    path, pickled = place / "model.safetensors", place / "pytorch_model.bin"
    try:
        if pickled.exists() and not path.exists() and not safetensors_only:
            # as older sentence-transformers wrote it; with `weights_only` no code of it runs
            return torch.load(pickled, map_location="cpu", weights_only=True)
        return load_file(path)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({' '.join(str(error).split())})"
        ) from error
