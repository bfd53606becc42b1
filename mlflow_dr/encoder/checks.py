"""What is refused of a directory of sentence-transformers: before its weights are read, and after.

`check_description` refuses settings that are not supported, by name. `check_agreement` compares the
vectors of two texts with the library's, so it also finds differences that have no known name.

Layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html, as written by
versions 2 to 6.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import SUPPORTED, TOKENS, Encoder, positions
from mlflow_dr.encoder.tokenize import TextTokenizer
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
# arguments of the tokenizer that change no token
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "padding": (True, "longest"),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt",),
    "add_special_tokens": (True,),
}
MODEL_OPTIONS = ("torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "subfolder")

TEXTS = (
    "Who kept the lighthouse?",
    "The harbour pilot, Ms Ångström, boards EVERY tanker at 6:30 before it enters the channel; "
    "gulls follow the trawlers home because of the offal, and the ferry returns at noon.",
)
TOLERANCE = 1e-4


def is_sentence_transformer(directory: Path) -> bool:
    """Whether the directory has sentence-transformers' list of modules."""
    return os.path.lexists(directory / MODULES)  # a dangling link is damage, not a bare backbone


def transformer_directories(directory: Path) -> list[Path]:
    """The folders of backbones and tokenizers: the directory itself, or `0_Transformer`."""
    return [
        directory / path for kind, path in all_modules(directory) if kind.endswith(".Transformer")
    ]


def check_description(
    directory: Path, any_similarity: bool = False, safetensors_only: bool = False
) -> None:
    """Refuse settings that are not supported, without reading weights.

    Args:
        directory: the folder of `modules.json`.
        any_similarity: ignore how the directory compares vectors, because the user has said it.
        safetensors_only: refuse weights in any other format.

    Raises:
        CheckpointError: a file is malformed, or has a setting that is not supported.
    """
    path = directory / SETTINGS
    with _malformed(path):
        settings = dict(json.loads(path.read_bytes())) if path.exists() else {}
        prompts = dict(settings.get("prompts") or {})
        for name, text in prompts.items():
            if not isinstance(text, str | None):
                raise TypeError(f"prompt {name!r} is {quoted(text)}")
    kind = settings.get("model_type", KIND)
    similarity = settings.get("similarity_fn_name") or "cosine"
    if kind != KIND:
        raise CheckpointError(
            f"{path}: the model is a {quoted(kind)}, which does not make one vector of each text; "
            f"expected a {KIND}"
        )
    if similarity not in SIMILARITIES and not any_similarity:
        raise CheckpointError(
            f"{path}: similarity_fn_name {quoted(similarity)} is not supported; choose cosine with "
            "--normalize or dot product with --no-normalize"
        )
    if settings.get("truncate_dim") is not None:
        raise CheckpointError(f"{path}: truncate_dim is not supported; remove it")
    for kind, module in all_modules(directory):
        _check_module(directory, kind, module, any(prompts.values()))
        weights = directory / module / "model.safetensors"
        if safetensors_only and kind.rsplit(".", 1)[-1] in WEIGHTED and not weights.exists():
            raise CheckpointError(f"{weights} is missing; only safetensors are read")


@contextmanager
def checkpoint_errors(directory: Path) -> Iterator[None]:
    """Turn any error that a directory's files cause into a CheckpointError that names it.

    Files from elsewhere can be wrong in any way, and libraries raise any error about them.
    """
    try:
        yield
    except (MlflowDrError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{directory}: the pickled weights are damaged or contain code, which is not run; save "
            "them as safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{directory}: cannot be read ({one_line(error)})") from error


def _check_module(directory: Path, kind: str, path: str, has_prompts: bool) -> None:
    """Refuse a module, or a setting of it, that is not supported.

    Args:
        directory: the model's.
        kind: the full name of the module's class.
        path: the module's folder in the directory.
        has_prompts: whether the model has a prompt that is not empty.
    """
    name = kind.rsplit(".", 1)[-1]
    if not kind.startswith(LIBRARY) or name not in (*SOURCES, *SUPPORTED, *ROUTERS):
        raise CheckpointError(
            f"{directory / MODULES}: module {quoted(kind)} is not supported; supported are "
            f"{', '.join((*SOURCES, *SUPPORTED))} and Router"
        )
    if name == "Transformer":
        _check_transformer(directory, path)
    file = directory / path / "config.json"
    if name in ("Pooling", "Dense") and not file.exists():
        raise CheckpointError(f"{file} is missing")
    if path and file.exists():
        with _malformed(file):
            settings = dict(json.loads(file.read_bytes()))
        if has_prompts and not settings.get("include_prompt", True):
            raise CheckpointError(f"{file}: {INCLUDE_PROMPT}")


def _check_transformer(directory: Path, path: str) -> None:
    """Refuse settings of the library's Transformer that would give other tokens or vectors."""
    from sentence_transformers.base.modules import Transformer

    file = directory / path / LENGTHS
    with _malformed(file):
        config = Transformer.load_config(str(directory), subfolder=path, local_files_only=True)
        text = config["modality_config"].get("text")
        is_unsupported = {
            "transformer_task": config.get("transformer_task", "feature-extraction")
            != "feature-extraction",
            "query_expansion": config.get("query_expansion") is not None,
            "modality_config": "message" in config["modality_config"]
            or text != {"method": "forward", "method_output_name": "last_hidden_state"},
            "module_output_name": config.get("module_output_name", TOKENS) != TOKENS,
        }
        for part in ("model_args", "model_kwargs"):
            for key in dict(config.get(part) or {}):
                is_unsupported[f"{part}.{key}"] = key not in MODEL_OPTIONS
        for part, values in dict(config.get("processing_kwargs") or {}).items():
            for key, value in dict(values).items():
                is_length = part == "text" and key == "max_length" and isinstance(value, int)
                is_harmless = is_length or value in HARMLESS.get(key, ())
                is_unsupported[f"processing_kwargs.{part}.{key}"] = not is_harmless
    if names := [name for name, wrong in is_unsupported.items() if wrong]:
        raise CheckpointError(f"{file}: {names[0]:.120} has a value that is not supported")


def all_modules(directory: Path) -> Iterator[tuple[str, str]]:
    """Type and path of each module of a directory, with those that a router leads to."""
    yield from _with_routes(directory, "", listed_modules(directory))


def listed_modules(directory: Path) -> list[tuple[str, str]]:
    """Type and path of each module of a directory, as `modules.json` lists them."""
    path = directory / MODULES
    with _malformed(path):
        modules = json.loads(path.read_bytes())
        if kwargs := [module["kwargs"] for module in modules if module.get("kwargs")]:
            raise CheckpointError(
                f"{path}: kwargs {quoted(kwargs[0])} of a module are not supported"
            )
        return [_type_and_path(module["type"], module["path"]) for module in modules]


def _with_routes(
    directory: Path, folder: str, modules: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    for kind, name in modules:
        path = "/".join(part for part in (folder, name) if part)
        yield kind, path
        if kind.rsplit(".", 1)[-1] in ROUTERS:
            file = directory / path / ROUTER
            file = file if file.exists() else file.with_name("config.json")
            with _malformed(file):
                routed = [
                    _type_and_path(*route[::-1])
                    for route in json.loads(file.read_bytes())["types"].items()
                ]
            yield from _with_routes(directory, path, routed)


def _type_and_path(kind: object, path: object) -> tuple[str, str]:
    """A module's type and folder; the folder must be inside the model's directory."""
    if not isinstance(kind, str) or not isinstance(path, str):
        raise TypeError(f"{quoted((kind, path))} are not the type and path of a module")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"path {quoted(path)} leads out of the directory")
    return kind, path


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Turn the errors that unexpected contents of a file cause into one that names the file."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not as sentence-transformers writes it ({one_line(error)})"
        ) from error


@torch.inference_mode()
def check_agreement(model: Any, encoder: Encoder, name: object) -> None:
    """Compare the vectors of two texts, as queries and as passages, with the library's.

    Args:
        model: the SentenceTransformer; it encodes the texts one by one, without padding.
        encoder: made of the same modules; it encodes the texts as one batch.
        name: what an error names.

    Raises:
        CheckpointError: the vectors differ.
    """
    encoder.eval()
    for part in encoder.distinct_encoders:
        # the library itself does not cut a text at the backbone's positions, and would fail
        limit = positions(part.backbone)
        if limit is not None:
            part.tokenizer.model_max_length = min(part.tokenizer.model_max_length, limit)
    for task, part, encode in (
        ("query", encoder.query_encoder, model.encode_query),
        ("document", encoder, model.encode_document),
    ):
        theirs = encode(list(TEXTS), batch_size=1, convert_to_tensor=True, show_progress_bar=False)
        theirs = theirs.float()
        if part.settings.normalize:
            theirs = torch.nn.functional.normalize(theirs, dim=-1)
        difference = float((_vectors(part, task) - theirs).abs().max())
        if difference > TOLERANCE * max(1.0, float(theirs.abs().max())):
            raise CheckpointError(
                f"{name}: the vectors of a {task} differ from sentence-transformers' by "
                f"{difference:.1e}, so the model has a setting that is not supported, such as "
                "token types, padding at the left, or a pooling inside the backbone"
            )


def _vectors(encoder: Encoder, task: str) -> Tensor:
    text_tokenizer = TextTokenizer.of(encoder)
    if task == "query":
        rows = text_tokenizer.query_ids([Query("", text) for text in TEXTS])
    else:
        rows = text_tokenizer.passage_ids([Passage("", "", text) for text in TEXTS])
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return encoder(
        pad_sequence(ids, batch_first=True, padding_value=text_tokenizer.pad_id),
        pad_sequence(masks, batch_first=True),
    )
