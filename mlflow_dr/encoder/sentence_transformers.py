"""Directories of sentence-transformers, loaded by the library itself.

What the library would answer (`encode_query`, `encode_document`, `similarity`) is what an encoder
gives; a setting that cannot be taken is refused by name. Layout:
https://sbert.net/docs/package_reference/sentence_transformer/models.html, of versions 2 to 6.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.head import SENTENCE, SUPPORTED, TOKENS, input_of, is_normalized, output_of
from mlflow_dr.encoder.model import is_static, positions
from mlflow_dr.errors import CheckpointError, MlflowDrError, one_line

log = logging.getLogger(__name__)

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
ROUTER = "router_config.json"
LENGTHS = "sentence_bert_config.json"
LIBRARY = "sentence_transformers."
KIND = "SentenceTransformer"
SIMILARITIES = ("cosine", "dot")
SOURCES = ("Transformer", "StaticEmbedding")
ROUTERS = ("Router", "Asym")
WEIGHTED = ("Dense", "LayerNorm", "StaticEmbedding")
INCLUDE_PROMPT = "include_prompt is false: pooling without the prompt's tokens is not supported"
# the names of a prompt by task, in the library's order
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
UNLIMITED = 1_000_000
"""Tokenizers without a limit say a much larger number."""
WIDTHS = ("embedding_dimension", "word_embedding_dimension")
# the modules that have a config.json, and sizes one of which it must have
CONFIGURED = {"Pooling": WIDTHS, "Dense": ("out_features",), "LayerNorm": ("dimension",)}
# what may be said to the tokenizer at each call because it changes no token
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "padding": (True, "longest"),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt",),
    "add_special_tokens": (True,),
}
MODEL_OPTIONS = ("torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "subfolder")


class Route(NamedTuple):
    """How the texts of one task become vectors.

    Attributes:
        source: the module that has the backbone and the tokenizer.
        head: the modules after it.
        prompt: what is put before each text.
        max_length: tokens of a text at most.
    """

    source: Any
    head: list[nn.Module]
    prompt: str
    max_length: int


def is_sentence_transformer(directory: Path) -> bool:
    """Whether the directory has sentence-transformers' list of modules."""
    return (directory / MODULES).exists()


def transformer_directories(directory: Path) -> list[Path]:
    """Where backbones and tokenizers are: the directory itself, in old ones `0_Transformer`."""
    modules = _all_modules(directory, "", _modules(directory))
    return [directory / path for kind, path in modules if kind.endswith(".Transformer")]


def check_description(
    directory: Path, any_similarity: bool = False, safetensors_only: bool = False
) -> None:
    """Refuse what a directory says that cannot be taken, without reading weights.

    Args:
        directory: where `modules.json` is.
        any_similarity: whether the user has said how vectors are compared, so that what the
            directory says about that does not count.
        safetensors_only: refuse weights in any other format.

    Raises:
        CheckpointError: a file is malformed, or has a setting that cannot be taken.
    """
    path = directory / SETTINGS
    with _malformed(path):
        settings = dict(_json(path)) if path.exists() else {}
        prompts = dict(settings.get("prompts") or {})
        wrong = [name for name, text in prompts.items() if not isinstance(text, str | None)]
        if wrong:
            raise TypeError(f"prompt {wrong[0]!r} is no text")
        kind = settings.get("model_type", KIND)
        similarity = settings.get("similarity_fn_name") or "cosine"
    if kind != KIND:
        raise CheckpointError(
            f"{path}: the model is a {kind!r:.80}, which does not make one vector of each text; "
            f"expected a {KIND}"
        )
    if similarity not in SIMILARITIES and not any_similarity:
        raise CheckpointError(
            f"{path}: similarity_fn_name {similarity!r:.80} is not supported; choose cosine with "
            "--normalize or dot product with --no-normalize"
        )
    if settings.get("truncate_dim") is not None:
        raise CheckpointError(f"{path}: truncate_dim is not supported; remove it")
    for kind, module in _all_modules(directory, "", _modules(directory)):
        _check_module(directory, kind, module, any(prompts.values()))
        place = directory / module
        if kind.rsplit(".", 1)[-1] in WEIGHTED:
            _check_weights(place, safetensors_only)


def load_model(directory: Path, backbone: type[nn.Module], **options: Any) -> Any:
    """The library's own model of a directory, in fp32 on the CPU.

    Args:
        directory: one that `check_description` lets pass.
        backbone: the class that stands for the library's Transformer.
        options: what the library's constructor takes.

    Raises:
        CheckpointError: the library cannot read it.
    """
    from sentence_transformers import SentenceTransformer

    types = [kind for kind, _ in _all_modules(directory, "", _modules(directory))]
    with reading(directory):
        return SentenceTransformer._load_with_module_classes(
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
        The route of queries and the route of documents. Their heads are one list where the modules
        are the same, and end with a normalisation where the model compares by cosine.

    Raises:
        CheckpointError: modules that cannot be taken.
    """
    query, document = (_modules_of(model, task, name) for task in PROMPTS)
    heads = {task: modules[1:] for task, modules in zip(PROMPTS, (query, document), strict=True)}
    if heads["query"] == heads["document"]:
        heads["document"] = heads["query"]
    for head in {id(head): head for head in heads.values()}.values():
        if model.similarity_fn_name == "cosine" and not is_normalized(head):
            head.append(_normalize())
    routes = []
    for task, modules in zip(PROMPTS, (query, document), strict=True):
        prompt = _prompt(model, task)
        _check_head(heads[task], prompt, name)
        routes.append(Route(modules[0], heads[task], prompt, _max_length(modules[0], task)))
    return routes[0], routes[1]


def write_description(
    directory: Path, config: EncoderConfig, source: str, head: Sequence[Any], length: int
) -> None:
    """Describe an encoder to sentence-transformers, and write its head with the weights.

    Args:
        directory: the encoder's directory, with backbone and tokenizer.
        config: prompts and lengths.
        source: what the backbone is, one of `SOURCES`.
        head: the modules after the backbone.
        length: tokens of a text where the library is not told what the text is.
    """
    kinds = [source]
    for index, module in enumerate(head, start=1):
        kinds.append(type(module).__name__)
        place = directory / module_folder(index, module)
        place.mkdir()
        module.save(str(place))
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


def write_router(directory: Path, query_tower: str) -> None:
    """Describe two towers to sentence-transformers: one for queries, one for documents.

    Args:
        directory: the documents' encoder, described already, with the queries' in it.
        query_tower: the folder of the queries' encoder.
    """
    routes = {
        "document": _modules(directory),
        "query": [
            (kind, f"{query_tower}/{path}" if path else query_tower)
            for kind, path in _modules(directory / query_tower)
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


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Turns whatever the files of a directory lead to into one error that names the directory.

    What somebody else has written may be wrong in any way, and so may what a library makes of it.
    """
    try:
        yield
    except (MlflowDrError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: cannot be read ({one_line(error)})") from error


def _check_module(directory: Path, kind: str, path: str, has_prompts: bool) -> None:
    """Refuse a module, or a setting of it, that cannot be taken.

    Args:
        directory: the model's.
        kind: the full name of the module's class.
        path: the module's folder in the directory.
        has_prompts: whether the model has a prompt that is not empty.
    """
    name = kind.rsplit(".", 1)[-1]
    if not kind.startswith(LIBRARY) or name not in (*SOURCES, *SUPPORTED, *ROUTERS):
        raise CheckpointError(
            f"{directory / MODULES}: module {kind!r:.120} is not supported; supported are "
            f"{', '.join((*SOURCES, *SUPPORTED))} and Router"
        )
    if name == "Transformer":
        _check_transformer(directory, path)
    file = directory / path / "config.json"
    if name in CONFIGURED:
        with _malformed(file):
            values = _json(file)
            includes_prompt = values.get("include_prompt", True)
            if not any(isinstance(values.get(key), int) for key in CONFIGURED[name]):
                raise KeyError(CONFIGURED[name][0])
        if not includes_prompt and has_prompts:
            raise CheckpointError(f"{file}: {INCLUDE_PROMPT}")


def _check_weights(place: Path, safetensors_only: bool) -> None:
    """Name the file of weights that the library could not read, or that do not fit."""
    path, pickled = place / "model.safetensors", place / "pytorch_model.bin"
    if pickled.exists() and not path.exists() and not safetensors_only:
        return  # as older versions wrote it; the library reads it without running code of it
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shape = file.get_slice("linear.weight").get_shape() if "linear.weight" in names else []
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({one_line(error)})"
        ) from error
    if shape and (config := place / "config.json").exists():
        with _malformed(config):
            values = _json(config)
            said = [values["out_features"], values["in_features"]]
        if shape != said:
            raise CheckpointError(
                f"{path}: weights {shape} do not fit config.json, which says {said}"
            )


def _check_transformer(directory: Path, path: str) -> None:
    """Refuse settings of the library's Transformer that would give other tokens or vectors."""
    from sentence_transformers.base.modules import Transformer

    file = directory / path / LENGTHS
    with _malformed(file):
        config = Transformer.load_config(str(directory), subfolder=path, local_files_only=True)
        int(config.get("max_seq_length") or 0)
        text = config["modality_config"].get("text")
        wrong = {
            "transformer_task": config.get("transformer_task", "feature-extraction")
            != "feature-extraction",
            "query_expansion": config.get("query_expansion") is not None,
            "modality_config": "message" in config["modality_config"]
            or text != {"method": "forward", "method_output_name": "last_hidden_state"},
            "module_output_name": config.get("module_output_name", TOKENS) != TOKENS,
        }
        for part in ("model_args", "model_kwargs"):
            wrong |= {
                f"{part}.{key}": key not in MODEL_OPTIONS for key in dict(config.get(part) or {})
            }
        for part, values in dict(config.get("processing_kwargs") or {}).items():
            for key, value in dict(values).items():
                is_length = part == "text" and key == "max_length" and isinstance(value, int)
                wrong[f"processing_kwargs.{part}.{key}"] = not (
                    is_length or value in HARMLESS.get(key, ())
                )
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise CheckpointError(f"{file}: {names[0]:.120} has a value that is not supported")


def _all_modules(
    directory: Path, inside: str, modules: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Type and path of each module, those that a router leads to included."""
    for kind, path in modules:
        place = "/".join(part for part in (inside, path) if part)
        yield kind, place
        if kind.rsplit(".", 1)[-1] in ROUTERS:
            file = directory / place / ROUTER
            file = file if file.exists() else file.with_name("config.json")
            with _malformed(file):
                types = [
                    (_text(kind), _inside(path)) for path, kind in _json(file)["types"].items()
                ]
            yield from _all_modules(directory, place, types)


def _modules_of(model: Any, task: str, name: object) -> list[Any]:
    """The modules that the texts of a task pass; a router's are those of its route."""
    modules: list[Any] = []
    with reading(Path(str(name))):
        for module in model:
            if type(module).__name__ in ROUTERS:
                modules += module.sub_modules[module._resolve_route(task=task, modality="text")]
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
    """The library's name of a module, whose class may be derived from the library's."""
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
    """What the library puts before the texts of a task."""
    name = next((name for name in PROMPTS[task] if name in model.prompts), None)
    prompt = str(model._resolve_prompt(None, name) or "")
    unused = [
        other
        for other in (*PROMPTS[task], model.default_prompt_name)
        if other and other != name and model.prompts.get(other)
    ]
    if not prompt and unused:
        log.warning(
            "the model has a prompt %r, which sentence-transformers does not put before a %s: "
            "neither is it here; name it %r in %s to use it",
            *(unused[0], task, PROMPTS[task][0], SETTINGS),
        )
    return prompt


def _max_length(source: Any, task: str) -> int:
    """Tokens of a text at most: what the library cuts at, within the backbone's positions."""
    if is_static(source):
        return int((source.tokenizer.truncation or {}).get("max_length", UNLIMITED))
    by_task = source.query_length if task == "query" else source.document_length
    asked = source.processing_kwargs.get("text", {}).get("max_length")
    limits = (asked or by_task or source.max_seq_length, positions(source.model))
    return min((int(limit) for limit in limits if limit and limit < UNLIMITED), default=UNLIMITED)


def _normalize() -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Normalize

    return Normalize()


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Type and path of each module of a directory, as `modules.json` lists them."""
    path = directory / MODULES
    with _malformed(path):
        values = _json(path)
        for module in values:
            if module.get("kwargs"):
                raise CheckpointError(
                    f"{path}: kwargs {module['kwargs']!r:.80} of a module are not supported"
                )
        return [(_text(module["type"]), _inside(module["path"])) for module in values]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value


def _inside(path: object) -> str:
    """A module's folder, which must not lead out of the model's directory."""
    parts = Path(_text(path)).parts
    if Path(_text(path)).is_absolute() or ".." in parts:
        raise ValueError(f"path {path!r:.80} leads out of the directory")
    return _text(path)


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Turns what a file of unexpected contents leads to into one error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not as sentence-transformers writes it ({one_line(error)})"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({one_line(error)})") from error


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
