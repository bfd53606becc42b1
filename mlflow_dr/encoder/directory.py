"""Loading an encoder from a directory: ours, one of sentence-transformers, or a bare backbone's.

sentence-transformers reads its own directories and ours. An encoder gives the vectors that the
library gives (`encode_query`, `encode_document`), and its dot product is the library's
`similarity`. Layout, of versions 2 to 6:
https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_dr import compat
from mlflow_dr.encoder.checks import (
    INCLUDE_PROMPT,
    LIBRARY,
    MODULES,
    ROUTERS,
    SETTINGS,
    SOURCES,
    all_modules,
    check_agreement,
    check_description,
    checkpoint_errors,
    is_sentence_transformer,
)
from mlflow_dr.encoder.config import SHORTEST, EncoderConfig
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.model import (
    SUPPORTED,
    TOKENS,
    UNLIMITED,
    Encoder,
    is_normalized,
    is_static,
    positions,
    shortest,
    with_settings,
)
from mlflow_dr.errors import CheckpointError, UsageError, one_line, quoted

log = logging.getLogger(__name__)

CONFIG = "mlflow_dr.json"
LAYOUT = 2
OWN_SETTINGS = {"title_separator": str, "strip_question_mark": bool}
OPTIONAL_SETTINGS = {"title_as_pair": bool}
"""Settings that are written only where they are not False."""
LONGEST_BY_DEFAULT = 512
# task -> names of its prompt, in the library's order
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


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
    """Load an encoder from a directory or from the Hugging Face hub.

    Args:
        name: our directory, a directory of sentence-transformers, a bare backbone's directory, or a
            hub name.
        attention: transformers' `attn_implementation`.
        trust_remote_code: whether code in the directory may run.
        safetensors_only: refuse weights in any other format.
        tokenizer: a directory or hub name whose tokenizer replaces the encoder's own.
        cache_dir: the folder for files from the hub; Hugging Face's own cache when None.
        bare_pooling: the pooling of a backbone whose directory does not name one. When None, it is
            the library's choice: `last` for a language model that looks to the left only, `mean`
            for others.
        changes: fields of `EncoderConfig` that replace what the directory says.

    Returns:
        The encoder in fp32 on the CPU, in evaluation mode.

    Raises:
        UsageError: no encoder has this name.
        CheckpointError: its files are damaged, missing or of an unknown kind.
    """
    directory = encoder_directory(str(name), cache_dir)
    options: dict[str, Any] = {
        "model_kwargs": {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir},
        "processor_kwargs": {"trust_remote_code": trust_remote_code},
        "config_kwargs": {"trust_remote_code": trust_remote_code},
    }
    if tokenizer:
        options["processor_kwargs"]["tokenizer_directory"] = encoder_directory(tokenizer, cache_dir)
    if attention:
        options["model_kwargs"]["attn_implementation"] = attention
    if safetensors_only:
        options["model_kwargs"]["use_safetensors"] = True
    with checkpoint_errors(directory):
        if is_sentence_transformer(directory):
            check_description(directory, "normalize" in changes, safetensors_only)
            encoder = _load_described(directory, options)
            encoder = with_settings(encoder, changes)
        elif (directory / CONFIG).exists():
            raise CheckpointError(f"{directory}: {CONFIG} without {MODULES}; publish it again")
        else:
            encoder = _load_bare(directory, str(name), options, changes, bare_pooling)
    return encoder.eval()


def _load_described(directory: Path, options: dict[str, Any]) -> Encoder:
    """An encoder that the files of sentence-transformers describe; ours are among them."""
    from sentence_transformers import SentenceTransformer

    from mlflow_dr.encoder.backbone import Backbone

    is_ours = os.path.lexists(directory / CONFIG)  # a dangling link counts, too
    own = _own_settings(directory / CONFIG) if is_ours else {}
    kinds = [kind for kind, _ in all_modules(directory) if kind.endswith(".Transformer")]
    model = compat.load_with_module_classes(
        SentenceTransformer,
        str(directory),
        dict.fromkeys(kinds, Backbone),
        device="cpu",
        local_files_only=True,
        **options,
    )
    encoder = encoder_from_model(model, directory, own)
    if not is_ours:
        check_agreement(model, encoder, directory)
    # the model and its card name each other, so the weights would outlive the encoder until
    # Python's garbage collector looks at all objects
    model.model_card_data.model = None
    return encoder


def _load_bare(
    directory: Path,
    name: str,
    options: dict[str, Any],
    changes: dict[str, Any],
    bare_pooling: str | None,
) -> Encoder:
    """An encoder with a backbone whose directory does not say how vectors are made."""
    from mlflow_dr.encoder.backbone import Backbone, refuse_classifier, usual_pooling

    if "pooling" not in changes and bare_pooling is None:
        refuse_classifier(directory)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    source = Backbone(
        str(directory),
        modality_config={"text": text},
        module_output_name=TOKENS,
        **options,
    )
    tokenizer: Any = source.tokenizer
    longest = shortest(
        tokenizer.model_max_length, positions(source.model), default=LONGEST_BY_DEFAULT
    )
    if longest < SHORTEST:
        raise CheckpointError(
            f"{name}: config.json and tokenizer_config.json allow texts of {longest} tokens; at "
            f"least {SHORTEST} are needed"
        )
    if "pooling" not in changes:
        pooling = bare_pooling or usual_pooling(source.config)
        changes = {"pooling": pooling, **changes}
        log.warning("%s is a bare backbone; its pooling is %s", name, pooling)
    config = EncoderConfig("mean", query_max_length=longest, passage_max_length=longest)
    return Encoder(source.model, tokenizer, replace(config, **changes))


def _own_settings(path: Path) -> dict[str, Any]:
    """The settings in our own file.

    Raises:
        CheckpointError: the file is malformed, or another version of mlflow_dr wrote it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        layout, own = values["layout"], dict(values["encoder"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from error
    if layout != LAYOUT:
        raise CheckpointError(
            f"{path}: layout {quoted(layout)} was written by another version of mlflow_dr; this "
            f"version reads layout {LAYOUT}"
        )
    kinds = {name: type(value) for name, value in own.items()}
    if kinds not in (OWN_SETTINGS, OWN_SETTINGS | OPTIONAL_SETTINGS):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in OWN_SETTINGS.items())
        raise CheckpointError(f"{path}: encoder is {quoted(own)}; expected {expected}")
    return own


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
