"""Directories of sentence-transformers, loaded by the library itself; ours are among them.

An encoder gives the vectors that the library gives (`encode_query`, `encode_document`), and its dot
product is the library's `similarity`. Layout:
https://sbert.net/docs/package_reference/sentence_transformer/models.html, of versions 2 to 6.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mlflow_dr import compat
from mlflow_dr.encoder.checks import (
    INCLUDE_PROMPT,
    LIBRARY,
    ROUTERS,
    SETTINGS,
    SOURCES,
    all_modules,
)
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import (
    SUPPORTED,
    UNLIMITED,
    Encoder,
    is_normalized,
    is_static,
    positions,
    shortest,
)
from mlflow_dr.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)

# task -> names of its prompt, in the library's order
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


def load_model(directory: Path, backbone: type[nn.Module], **options: Any) -> Any:
    """The library's own model of a directory, in fp32 on the CPU.

    Args:
        directory: has passed `check_description`.
        backbone: the class that replaces the library's Transformer.
        options: arguments of the library's constructor.
    """
    from sentence_transformers import SentenceTransformer

    types = [kind for kind, _ in all_modules(directory)]
    return compat.load_with_module_classes(
        SentenceTransformer,
        str(directory),
        {kind: backbone for kind in types if kind.endswith(".Transformer")},
        device="cpu",
        local_files_only=True,
        **options,
    )


def encoder_from_model(model: Any, name: object, own: Mapping[str, Any] | None = None) -> Encoder:
    """An encoder made of the modules of a SentenceTransformer; they share their weights.

    Args:
        model: the library's model.
        name: what an error names.
        own: settings that the library does not have.

    Raises:
        CheckpointError: the model has modules or settings that are not supported.
    """
    query, document = (_modules_of(model, task, name) for task in PROMPTS)
    is_cosine = model.similarity_fn_name == "cosine"
    try:
        config = EncoderConfig(
            query_prompt=_prompt(model, "query"),
            passage_prompt=_prompt(model, "document"),
            query_max_length=_max_length(query[0], "query"),
            passage_max_length=_max_length(document[0], "document"),
            **(own or {}),
        )
        untied = None if query == document else _encoder_of_modules(query, config, is_cosine)
        return _encoder_of_modules(document, config, is_cosine, untied)
    except (UsageError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _encoder_of_modules(
    modules: Sequence[Any],
    config: EncoderConfig,
    is_cosine: bool,
    untied_query_encoder: Encoder | None = None,
) -> Encoder:
    from sentence_transformers.sentence_transformer.modules import Normalize

    source, *head = modules
    if (config.query_prompt or config.passage_prompt) and not all(
        getattr(module, "include_prompt", True) for module in head
    ):
        raise UsageError(INCLUDE_PROMPT)
    if is_cosine and not is_normalized(head):
        head.append(Normalize())
    if is_static(source):
        backbone, tokenizer = source, _static_tokenizer(source.tokenizer)
    else:
        backbone, tokenizer = source.model, source.tokenizer
        limit = positions(backbone) or UNLIMITED  # the other task may have another backbone
        config = replace(
            config,
            query_max_length=min(config.query_max_length, limit),
            passage_max_length=min(config.passage_max_length, limit),
        )
    return Encoder(backbone, tokenizer, config, untied_query_encoder, head)


def _static_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a table of token vectors, as transformers' class without special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.processors import Sequence
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.post_processor = Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def _modules_of(model: Any, task: str, name: object) -> list[Any]:
    """The modules for the texts of a task; of a router, those of the task's route."""
    modules: list[Any] = []
    for module in model:
        if type(module).__name__ in ROUTERS:
            modules += module.sub_modules[compat.text_route(module, task)]
        else:
            modules.append(module)
    kinds = [_kind(module) for module in modules]
    wrong = [kind for kind in kinds[:1] if kind not in SOURCES]
    wrong += [kind for kind in kinds[1:] if kind not in SUPPORTED]
    if wrong or not modules:
        raise CheckpointError(
            f"{name}: a {wrong[0] if wrong else 'missing'} module is not supported; expected "
            f"{' or '.join(SOURCES)}, then {', '.join(SUPPORTED)}"
        )
    return modules


def _kind(module: object) -> str:
    """The library's name of a module; the module's class may be derived from the library's."""
    kinds = type(module).__mro__
    names = (kind.__name__ for kind in kinds if kind.__module__.startswith(LIBRARY))
    return next(names, kinds[0].__name__)


def _prompt(model: Any, task: str) -> str:
    """What the library puts before a task's texts: the task's prompt, or the default prompt."""
    names = [*PROMPTS[task], model.default_prompt_name]
    name = next((name for name in PROMPTS[task] if name in model.prompts), names[-1])
    prompt = str(model.prompts.get(name) or "")
    unused = [other for other in names if other != name and model.prompts.get(other)]
    if not prompt and unused:
        log.warning(
            "the model has a prompt %r, which sentence-transformers does not put before a %s, so "
            "it is not used; name it %r in %s to use it",
            *(unused[0], task, PROMPTS[task][0], SETTINGS),
        )
    return prompt


def _max_length(source: Any, task: str) -> int:
    """The most tokens of a text: the library's limit, or the backbone's positions if fewer."""
    if is_static(source):
        return int((source.tokenizer.truncation or {}).get("max_length", UNLIMITED))
    by_task = source.query_length if task == "query" else source.document_length
    configured = source.processing_kwargs.get("text", {}).get("max_length")
    limit = configured or by_task or source.max_seq_length
    return shortest(limit, positions(source.model), default=UNLIMITED)
