"""Directories of sentence-transformers: loaded by the library itself, and written.

An encoder gives the vectors that the library gives (`encode_query`, `encode_document`), and its dot
product is the library's `similarity`. Layout:
https://sbert.net/docs/package_reference/sentence_transformer/models.html, of versions 2 to 6.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mlflow_dr import compat
from mlflow_dr.encoder.checks import (
    INCLUDE_PROMPT,
    KIND,
    LENGTHS,
    LIBRARY,
    MODULES,
    ROUTER,
    ROUTERS,
    SETTINGS,
    SOURCES,
    all_modules,
    checkpoint_errors,
    listed_modules,
)
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.head import SENTENCE, SUPPORTED, TOKENS, input_of, is_normalized, output_of
from mlflow_dr.encoder.model import is_static, positions
from mlflow_dr.errors import CheckpointError

log = logging.getLogger(__name__)

# task -> names of its prompt, in the library's order
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
UNLIMITED = 1_000_000
"""Tokenizers without a limit have a much larger `model_max_length`."""


class Route(NamedTuple):
    """How the texts of one task become vectors.

    Attributes:
        source: the module that has the backbone and the tokenizer.
        head: the modules after it.
        prompt: put before each text.
        max_length: the most tokens of a text.
    """

    source: Any
    head: list[nn.Module]
    prompt: str
    max_length: int


def load_model(directory: Path, backbone: type[nn.Module], **options: Any) -> Any:
    """The library's own model of a directory, in fp32 on the CPU.

    Args:
        directory: has passed `check_description`.
        backbone: the class that replaces the library's Transformer.
        options: arguments of the library's constructor.

    Raises:
        CheckpointError: the library cannot read it.
    """
    from sentence_transformers import SentenceTransformer

    types = [kind for kind, _ in all_modules(directory)]
    with checkpoint_errors(directory):
        return compat.load_with_module_classes(
            SentenceTransformer,
            str(directory),
            {kind: backbone for kind in types if kind.endswith(".Transformer")},
            device="cpu",
            local_files_only=True,
            **options,
        )


def routes_of(model: Any, name: object) -> tuple[Route, Route]:
    """How a model's queries and documents become vectors.

    Args:
        model: a SentenceTransformer.
        name: what an error names.

    Returns:
        The route of queries and the route of documents. Their heads are the same list if the
        modules are the same. A head ends with a normalisation if the model compares by cosine.

    Raises:
        CheckpointError: the model has modules or settings that are not supported.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize

    query, document = (_modules_of(model, task, name) for task in PROMPTS)
    heads = {task: modules[1:] for task, modules in zip(PROMPTS, (query, document), strict=True)}
    if heads["query"] == heads["document"]:
        heads["document"] = heads["query"]
    for head in {id(head): head for head in heads.values()}.values():
        if model.similarity_fn_name == "cosine" and not is_normalized(head):
            head.append(Normalize())
    routes = []
    for task, modules in zip(PROMPTS, (query, document), strict=True):
        prompt = _prompt(model, task)
        _check_head(heads[task], prompt, name)
        routes.append(Route(modules[0], heads[task], prompt, _max_length(modules[0], task)))
    return routes[0], routes[1]


def static_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a table of token vectors, as transformers' class without special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.processors import Sequence
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.post_processor = Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def write_description(
    directory: Path, config: EncoderConfig, source: str, head: Sequence[Any], length: int
) -> None:
    """Describe an encoder to sentence-transformers, and write its head with the weights.

    Args:
        directory: the encoder's directory, with backbone and tokenizer.
        config: prompts and lengths.
        source: the kind of the backbone, one of `SOURCES`.
        head: the modules after the backbone.
        length: the most tokens of a text that is neither called a query nor a document.
    """
    kinds = [source]
    for index, module in enumerate(head, start=1):
        kinds.append(type(module).__name__)
        folder = directory / module_folder(index, module)
        folder.mkdir()
        module.save(str(folder))
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"{LIBRARY}models.{kind}",  # the name that all versions know
        }
        for index, kind in enumerate(kinds)
    ]
    _write(directory / MODULES, modules)
    query, passage = config.query_max_length, config.passage_max_length
    lengths = {} if query == passage else {"query_length": query, "document_length": passage}
    if source == SOURCES[0]:
        values = {"max_seq_length": length, "do_lower_case": config.lowercase, **lengths}
        _write(directory / LENGTHS, values)
    _write(
        directory / SETTINGS,
        {
            "model_type": KIND,
            "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if is_normalized(head) else "dot",
        },
    )


def module_folder(index: int, module: object) -> str:
    """The folder of a module of the head, counted from 1."""
    return f"{index}_{type(module).__name__}"


def write_router(directory: Path, query_folder: str) -> None:
    """Describe an encoder of documents and one of queries to sentence-transformers.

    Args:
        directory: the described encoder of documents; the encoder of queries is inside it.
        query_folder: the folder of the encoder of queries.
    """
    routes = {
        "document": listed_modules(directory),
        "query": [
            (kind, f"{query_folder}/{path}" if path else query_folder)
            for kind, path in listed_modules(directory / query_folder)
        ],
    }
    _write(
        directory / ROUTER,
        {
            "types": {path or ".": kind for route in routes.values() for kind, path in route},
            "structure": {
                name: [path or "." for _, path in route] for name, route in routes.items()
            },
            "parameters": {"default_route": "document", "allow_empty_key": True},
        },
    )
    router = {"idx": 0, "name": "0", "path": "", "type": f"{LIBRARY}models.Router"}
    _write(directory / MODULES, [router])


def _modules_of(model: Any, task: str, name: object) -> list[Any]:
    """The modules for the texts of a task; of a router, those of the task's route."""
    modules: list[Any] = []
    with checkpoint_errors(Path(str(name))):
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


def _check_head(head: Sequence[Any], prompt: str, name: object) -> None:
    for module in head:
        kind = type(module).__name__
        if kind == "Pooling" and prompt and not module.include_prompt:
            raise CheckpointError(f"{name}: {INCLUDE_PROMPT}")
        for feature in (input_of(module), output_of(module)):
            if feature not in (TOKENS, SENTENCE):
                raise CheckpointError(
                    f"{name}: a {kind} module works on {feature!r:.80}; expected {TOKENS} or "
                    f"{SENTENCE}"
                )


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
    asked = source.processing_kwargs.get("text", {}).get("max_length")
    limits = (asked or by_task or source.max_seq_length, positions(source.model))
    return min((int(limit) for limit in limits if limit and limit < UNLIMITED), default=UNLIMITED)


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
