"""What a directory of sentence-transformers says, read without its weights.

A setting that cannot be taken is refused by name.

Layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html, as written by
versions 2 to 6.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlflow_dr.encoder.head import SUPPORTED, TOKENS
from mlflow_dr.errors import CheckpointError, MlflowDrError, one_line, quoted

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

LENGTH_NAMES = ("max_seq_length", "query_length", "document_length")


def is_sentence_transformer(directory: Path) -> bool:
    """Whether the directory has sentence-transformers' list of modules."""
    return os.path.lexists(directory / MODULES)  # a dangling link is no missing file


def transformer_directories(directory: Path) -> list[Path]:
    """Where backbones and tokenizers are: the directory itself, in old ones `0_Transformer`."""
    modules = all_modules(directory, "", listed_modules(directory))
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
    for kind, module in all_modules(directory, "", listed_modules(directory)):
        _check_module(directory, kind, module, any(prompts.values()))
        place = directory / module
        if kind.rsplit(".", 1)[-1] in WEIGHTED:
            _check_weights(place, safetensors_only)


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
        text = config["modality_config"].get("text")
        for name in LENGTH_NAMES:
            length = config.get(name)
            if length is not None and (type(length) is not int or length < 0):
                raise TypeError(f"{name} is {quoted(length)}, no number of tokens")
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


def all_modules(
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
            yield from all_modules(directory, place, types)


def listed_modules(directory: Path) -> list[tuple[str, str]]:
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
