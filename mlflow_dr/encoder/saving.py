"""Writing an encoder's directory, which `mlflow_dr`, sentence-transformers and AutoModel all load.

config.json, model.safetensors, tokenizer*      the backbone, for AutoModel
modules.json, 1_Pooling/, 2_Dense/, ...         the rest, as sentence-transformers writes it
mlflow_dr.json                                  settings that sentence-transformers does not have
query/                                          the encoder of queries, if it is another one
adapter_config.json, adapter_model.safetensors  instead of a backbone: adapters of another one
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors.torch import load_file
from torch import Tensor

from mlflow_dr.encoder import lora
from mlflow_dr.encoder.checks import (
    KIND,
    LENGTHS,
    LIBRARY,
    MODULES,
    ROUTER,
    SETTINGS,
    SOURCES,
    checkpoint_errors,
)
from mlflow_dr.encoder.directory import (
    CONFIG,
    LAYOUT,
    OPTIONAL_SETTINGS,
    OWN_SETTINGS,
    load_encoder,
)
from mlflow_dr.encoder.model import Encoder, is_adapted
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.files import grant_umask_modes, scratch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LoadedEncoder: TypeAlias = "Encoder | SentenceTransformer"

QUERY_FOLDER = "query"
TYPE = LIBRARY + "models.{}"
"""The name of a module's class that all versions of sentence-transformers know."""


def save_encoder(
    directory: Path,
    encoder: Encoder,
    state: Mapping[str, Tensor] | None = None,
    merged: bool = True,
) -> None:
    """Write an encoder so that mlflow_dr, sentence-transformers and AutoModel can load it.

    Args:
        directory: does not exist yet.
        encoder: what to write.
        state: weights to write instead of the encoder's own, under the names of
            `encoder.state_dict()`, such as a copy of those of an encoder that is being trained.
        merged: whether adapters become part of the backbone's weights; without this only the
            adapters are written.
    """
    state = state if state is not None else encoder.state_dict()
    length = encoder.settings.passage_max_length
    modules = _save_part(directory, encoder, state, merged, length)
    if encoder.untied_query_encoder is not None:
        query_encoder = encoder.untied_query_encoder
        query_modules = _save_part(
            directory / QUERY_FOLDER,
            query_encoder,
            _part_of(state, "untied_query_encoder."),
            merged,
            query_encoder.settings.query_max_length,
        )
        _write_router(directory, modules, query_modules)


def save_loaded_encoder(directory: Path, encoder: LoadedEncoder) -> None:
    """Write an encoder of ours or of sentence-transformers into a directory.

    Args:
        directory: does not exist yet.
        encoder: what to write.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(encoder, Encoder):
        save_encoder(directory, encoder)
        return
    if not any(kind.__name__ == "SentenceTransformer" for kind in type(encoder).__mro__):
        raise UsageError(
            "expected the name of an encoder, what `load_encoder` gives, or a SentenceTransformer, "
            f"not {quoted(encoder)}"
        )
    encoder.save_pretrained(str(directory), create_model_card=False)


def as_sentence_transformer(encoder: Encoder) -> SentenceTransformer:
    """A copy of an encoder as sentence-transformers' object, on the same device."""
    from sentence_transformers import SentenceTransformer

    from mlflow_dr.encoder.backbone import quiet_transformers

    with scratch() as directory, quiet_transformers():
        save_encoder(directory, encoder)
        return SentenceTransformer(str(directory), device=str(encoder.device))


def _save_part(
    directory: Path, encoder: Encoder, state: Mapping[str, Tensor], merged: bool, length: int
) -> list[tuple[str, str]]:
    """Write one encoder, without an untied query encoder.

    Args:
        directory: does not exist yet.
        encoder: what to write.
        state: its weights.
        merged: as in `save_encoder`.
        length: the most tokens of a text that `SentenceTransformer.encode` is given, neither as a
            query nor as a document.

    Returns:
        Type and folder of its modules.
    """
    directory.mkdir(parents=True)
    _save_backbone(directory, encoder, _part_of(state, "backbone."), merged)
    head: Any = copy.deepcopy(encoder.head)
    head.load_state_dict(_part_of(state, "head."))
    modules = [(SOURCES[1 if encoder.is_static else 0], "")]
    for index, module in enumerate(head, start=1):
        folder = _module_folder(index, module)
        (directory / folder).mkdir()
        module.save(str(directory / folder))
        modules.append((type(module).__name__, folder))
    _write_modules(directory, modules)
    config = encoder.settings
    query, passage = config.query_max_length, config.passage_max_length
    lengths = {} if query == passage else {"query_length": query, "document_length": passage}
    if not encoder.is_static:
        values = {"max_seq_length": length, "do_lower_case": config.lowercase, **lengths}
        _write(directory / LENGTHS, values)
    _write(
        directory / SETTINGS,
        {
            "model_type": KIND,
            "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if config.normalize else "dot",
        },
    )
    own = {name: getattr(config, name) for name in OWN_SETTINGS}
    own |= {name: True for name in OPTIONAL_SETTINGS if getattr(config, name)}
    _write(directory / CONFIG, {"layout": LAYOUT, "encoder": own})
    grant_umask_modes(directory)  # safetensors writes files that only their owner can read
    return modules


def _write_router(
    directory: Path, modules: list[tuple[str, str]], query_modules: list[tuple[str, str]]
) -> None:
    """Describe an encoder of documents and one of queries to sentence-transformers.

    Args:
        directory: the encoder of documents; the encoder of queries is inside it.
        modules: type and folder of the modules of documents.
        query_modules: those of queries, in the folder of the encoder of queries.
    """
    routes = {
        "document": [(kind, path or ".") for kind, path in modules],
        "query": [
            (kind, f"{QUERY_FOLDER}/{path}" if path else QUERY_FOLDER)
            for kind, path in query_modules
        ],
    }
    types = {path: TYPE.format(kind) for route in routes.values() for kind, path in route}
    _write(
        directory / ROUTER,
        {
            "types": types,
            "structure": {name: [path for _, path in route] for name, route in routes.items()},
            "parameters": {"default_route": "document", "allow_empty_key": True},
        },
    )
    _write_modules(directory, [("Router", "")])


def _write_modules(directory: Path, modules: list[tuple[str, str]]) -> None:
    described = [
        {"idx": index, "name": str(index), "path": path, "type": TYPE.format(kind)}
        for index, (kind, path) in enumerate(modules)
    ]
    _write(directory / MODULES, described)


def _module_folder(index: int, module: object) -> str:
    """The folder of a module of the head, counted from 1."""
    return f"{index}_{type(module).__name__}"


def _save_backbone(
    directory: Path, encoder: Encoder, state: dict[str, Tensor], merged: bool
) -> None:
    from mlflow_dr.encoder.backbone import quiet_transformers

    backbone = encoder.backbone
    if encoder.is_static:
        table = copy.deepcopy(backbone)
        table.load_state_dict(state)
        table.save(str(directory))
        return
    with quiet_transformers():
        if is_adapted(backbone) and not merged:
            lora.save_adapter(directory, backbone, state)
        else:
            if is_adapted(backbone):
                backbone, state = lora.merged_weights(backbone, state)
            backbone.save_pretrained(directory, state_dict=state)
    encoder.tokenizer.save_pretrained(directory)


def restore_encoder(directory: Path, encoder: Encoder, trust_remote_code: bool = False) -> None:
    """Read weights that `save_encoder(..., merged=False)` wrote back into an encoder.

    Args:
        directory: what `save_encoder` wrote.
        encoder: gets the weights; one with adapters gets the weights that are not its base's.
        trust_remote_code: whether code in the directory may run.

    Raises:
        CheckpointError: the directory is damaged, or its encoder has another shape.
    """
    with checkpoint_errors(directory):
        if not is_adapted(encoder.backbone):
            saved = load_encoder(
                directory, trust_remote_code=trust_remote_code, safetensors_only=True
            )
            encoder.load_state_dict(saved.state_dict())
            return
        lora.restore_adapter(directory, encoder.backbone)
        for index, module in enumerate(encoder.head, start=1):
            if module.state_dict():
                folder = directory / _module_folder(index, module)
                module.load_state_dict(load_file(folder / "model.safetensors"))
        if encoder.untied_query_encoder is not None:
            restore_encoder(
                directory / QUERY_FOLDER, encoder.untied_query_encoder, trust_remote_code
            )


def _part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one module, under the names that they have in it."""
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
