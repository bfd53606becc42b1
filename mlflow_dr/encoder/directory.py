"""The encoder's directory, which `mlflow_dr`, sentence-transformers and AutoModel all load.

config.json, model.safetensors, tokenizer*      the backbone, for AutoModel
modules.json, 1_Pooling/, 2_Dense/, ...         the rest, as sentence-transformers writes it
mlflow_dr.json                                  what sentence-transformers has no place for
query/                                          the queries' tower, where they have their own
adapter_config.json, adapter_model.safetensors  instead of the backbone: adapters of another one
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlflow_dr.encoder import description, lora
from mlflow_dr.encoder import sentence_transformers as st
from mlflow_dr.encoder.agreement import check_agreement
from mlflow_dr.encoder.changes import changed
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.head import TOKENS
from mlflow_dr.encoder.model import Encoder, is_static, positions
from mlflow_dr.encoder.quiet import quiet_transformers
from mlflow_dr.encoder.source import encoder_directory
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.files import grant_umask_modes

log = logging.getLogger(__name__)

CONFIG = "mlflow_dr.json"
QUERY_TOWER = "query"
LAYOUT = 2
OWN_SETTINGS = {"title_separator": str, "strip_question_mark": bool}
LONGEST_BY_DEFAULT = 512


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
        bare_pooling: the pooling of a backbone whose directory names none; the library's choice
            (`last` for a language model that looks to the left only, else `mean`) when None.
        changes: fields of `EncoderConfig` that replace what the directory says.

    Returns:
        The encoder in fp32 on the CPU, in evaluation mode.

    Raises:
        UsageError: there is no such encoder.
        CheckpointError: its files are damaged, missing or of a kind that is not known.
    """
    directory = encoder_directory(str(name), cache_dir)
    options: dict[str, Any] = {
        "model_kwargs": {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir},
        "processor_kwargs": {"trust_remote_code": trust_remote_code},
        "config_kwargs": {"trust_remote_code": trust_remote_code},
    }
    if attention:
        options["model_kwargs"]["attn_implementation"] = attention
    if safetensors_only:
        options["model_kwargs"]["use_safetensors"] = True
    words = str(encoder_directory(tokenizer, cache_dir)) if tokenizer else None
    with description.reading(directory):
        if description.is_sentence_transformer(directory):
            encoder = _load_described(directory, options, words, changes, safetensors_only)
        elif (directory / CONFIG).exists():
            raise CheckpointError(
                f"{directory}: {CONFIG} without {description.MODULES}; publish it again"
            )
        else:
            encoder = _load_bare(directory, str(name), options, words, changes, bare_pooling)
    return encoder.eval()


def _load_described(
    directory: Path,
    options: dict[str, Any],
    words: str | None,
    changes: dict[str, Any],
    safetensors_only: bool,
) -> Encoder:
    """An encoder that sentence-transformers' files describe, ours among them."""
    from mlflow_dr.encoder.backbone import Backbone

    is_ours = os.path.lexists(directory / CONFIG)  # a dangling link is no missing file
    own = _read_own_settings(directory / CONFIG) if is_ours else {}
    description.check_description(directory, "normalize" in changes, safetensors_only)
    kind = type("Backbone", (Backbone,), {"tokenizer_place": words}) if words else Backbone
    model = st.load_model(directory, kind, **options)
    encoder = encoder_of(model, directory, own)
    if not is_ours:
        check_agreement(model, encoder, directory)
    return changed(encoder, changes)


def encoder_of(model: Any, name: object, own: Mapping[str, Any] | None = None) -> Encoder:
    """An encoder of the modules of a SentenceTransformer, whose weights it shares.

    Args:
        model: the library's model.
        name: what an error names.
        own: settings that the library has no place for.

    Raises:
        CheckpointError: the model has modules or settings that cannot be taken.
    """
    query, document = st.routes_of(model, name)
    try:
        config = EncoderConfig(
            query_prompt=query.prompt,
            passage_prompt=document.prompt,
            query_max_length=query.max_length,
            passage_max_length=document.max_length,
            **(own or {}),
        )
        is_shared = query.source is document.source and query.head is document.head
        tower = None if is_shared else _tower(query, config)
        return _tower(document, config, tower)
    except UsageError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _tower(route: st.Route, config: EncoderConfig, query_tower: Encoder | None = None) -> Encoder:
    if is_static(route.source):
        backbone, tokenizer = route.source, st.static_tokenizer(route.source.tokenizer)
    else:
        backbone, tokenizer = route.source.model, route.source.tokenizer
        limit = positions(backbone)
        if limit is not None:  # the other task's length may be another backbone's
            config = replace(
                config,
                query_max_length=min(config.query_max_length, limit),
                passage_max_length=min(config.passage_max_length, limit),
            )
    return Encoder(backbone, tokenizer, config, query_tower, route.head)


def _load_bare(
    directory: Path,
    name: str,
    options: dict[str, Any],
    words: str | None,
    changes: dict[str, Any],
    bare_pooling: str | None,
) -> Encoder:
    """An encoder of a backbone whose directory does not say how vectors are made."""
    from mlflow_dr.encoder.backbone import Backbone, refuse_classifier, usual_pooling

    if "pooling" not in changes and bare_pooling is None:
        refuse_classifier(directory)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    source = Backbone(
        str(directory),
        tokenizer_name_or_path=words,
        modality_config={"text": text},
        module_output_name=TOKENS,
        **options,
    )
    tokenizer: Any = source.tokenizer
    limits = (tokenizer.model_max_length, positions(source.model))
    known = [int(limit) for limit in limits if limit and limit < st.UNLIMITED]
    longest = min(known, default=LONGEST_BY_DEFAULT)
    if "pooling" not in changes:
        pooling = bare_pooling or usual_pooling(source.config)
        changes = {"pooling": pooling, **changes}
        log.warning("%s is a bare backbone: taking %s pooling", name, pooling)
    config = EncoderConfig("mean", query_max_length=longest, passage_max_length=longest)
    return Encoder(source.model, tokenizer, replace(config, **changes))


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
            length where it is not told what a text is; it cuts all others at the passages'.
    """
    state = state if state is not None else encoder.state_dict()
    directory.mkdir(parents=True)
    _save_backbone(directory, encoder, _under("backbone.", state), merged)
    head = copy.deepcopy(encoder.head)
    head.load_state_dict(_under("head.", state))
    settings = encoder.settings
    length = settings.query_max_length if for_queries else settings.passage_max_length
    source = description.SOURCES[1 if encoder.is_static else 0]
    st.write_description(directory, settings, source, list(head), length)
    own = {name: getattr(settings, name) for name in OWN_SETTINGS}
    values = {"layout": LAYOUT, "encoder": own}
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    grant_umask_modes(directory)  # safetensors writes files that their owner alone may read
    if encoder.query_tower is not None:
        tower_state = _under("query_tower.", state)
        save_encoder(directory / QUERY_TOWER, encoder.query_tower, tower_state, merged, True)
        st.write_router(directory, QUERY_TOWER)


def _save_backbone(
    directory: Path, encoder: Encoder, state: dict[str, Tensor], merged: bool
) -> None:
    backbone = encoder.backbone
    if encoder.is_static:
        table = copy.deepcopy(backbone)
        table.load_state_dict(state)
        table.save(str(directory))
        return
    with quiet_transformers():
        if lora.is_adapted(backbone) and not merged:
            lora.save_adapter(directory, backbone, state)
        else:
            if lora.is_adapted(backbone):
                backbone, state = lora.merged_weights(backbone, state)
            backbone.save_pretrained(directory, state_dict=state)
    encoder.tokenizer.save_pretrained(directory)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that belongs to one module, under the names it has there."""
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _read_own_settings(path: Path) -> dict[str, Any]:
    """What our own file says, checked."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        layout, own = values["layout"], dict(values["encoder"])
        if layout != LAYOUT:
            made = "a newer" if layout > LAYOUT else "an earlier"
            raise CheckpointError(
                f"{path}: layout {layout} was written by {made} mlflow_dr; this one reads {LAYOUT}"
            )
        if unknown := sorted(set(own) - set(OWN_SETTINGS)):
            raise UsageError(
                f"unknown encoder settings {unknown}; known are {sorted(OWN_SETTINGS)}"
            )
        for name in OWN_SETTINGS:
            value = own[name]
            if not isinstance(value, OWN_SETTINGS[name]):
                raise UsageError(f"{name} is {value!r:.80}; expected {OWN_SETTINGS[name].__name__}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an encoder's description ({error})") from error
    except UsageError as error:
        raise CheckpointError(f"{path}: not an encoder's description ({error})") from error
    return own


def head_state(place: Path) -> dict[str, Tensor]:
    """The weights of one module of the head, from its own folder.

    Raises:
        CheckpointError: they are not there, or cannot be read.
    """
    path = place / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({' '.join(str(error).split())})"
        ) from error
