"""The directory layout of sentence-transformers, read as an `EncoderConfig` and written.

Layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html, as written by
versions 2 to 6. The library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow_dr.encoder.config import EncoderConfig, ProjectionConfig
from mlflow_dr.errors import CheckpointError, UsageError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
ROUTER = "router_config.json"
LIBRARY = "sentence_transformers.models"
LENGTHS = "sentence_bert_config.json"
PASSAGE_PROMPT_NAMES = ("document", "passage", "corpus")
WIDTHS = ("embedding_dimension", "word_embedding_dimension")

TORCH_NAMES = {
    "identity": "linear.Identity",
    "tanh": "activation.Tanh",
    "relu": "activation.ReLU",
    "gelu": "activation.GELU",
    "sigmoid": "activation.Sigmoid",
}
POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}
POOLING_NAMES = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}


def is_sentence_transformer(directory: Path) -> bool:
    """Whether the directory has sentence-transformers' list of modules."""
    return (directory / MODULES).exists()


def transformer_directory(directory: Path) -> Path:
    """Where backbone and tokenizer are: the directory itself, in old ones `0_Transformer`."""
    kinds = _modules(directory / MODULES)
    return directory / next((path for name, path in kinds if name.endswith("Transformer")), "")


def read_config(directory: Path, longest: int) -> tuple[EncoderConfig, list[Path]]:
    """The encoder that a sentence-transformers directory describes.

    Args:
        directory: where `modules.json` is.
        longest: the backbone's maximum length, taken where the directory names none.

    Returns:
        The configuration, and the directories of the projections' weights in order.

    Raises:
        CheckpointError: a file is malformed, or describes a module, pooling or activation that
            this encoder has no counterpart of.
    """
    modules = _modules(directory / MODULES)
    pooling, normalize = "mean", False
    projections: list[ProjectionConfig] = []
    weights: list[Path] = []
    for full_name, path in modules:
        kind = full_name.rsplit(".", 1)[-1]
        place = directory / path
        if kind == "Pooling":
            pooling = _pooling(place / "config.json")
        elif kind == "Dense" and not normalize:
            projections.append(_projection(place / "config.json"))
            weights.append(place)
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            raise CheckpointError(
                f"{directory / MODULES}: module {full_name} is not supported; supported are "
                "Transformer, Pooling, Dense, Dropout and Normalize, in this order"
            )
    length, lowercase = _length(transformer_directory(directory) / LENGTHS, longest)
    query_prompt, passage_prompt = _prompts(directory / PROMPTS)
    config = EncoderConfig(
        pooling=pooling,
        normalize=normalize,
        projections=tuple(projections),
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        query_max_length=length,
        passage_max_length=length,
        lowercase=lowercase,
    )
    return config, weights


def vector_size(directory: Path) -> int | None:
    """Dimensions of the vectors of a described encoder; None where the description does not say."""
    try:
        places = sorted(directory.glob("*_Dense/config.json"), key=_position)
        if places:
            return int(_json(places[-1])["out_features"])
        values = _json(next(directory.glob("*_Pooling/config.json")))
        return int(values[next(key for key in WIDTHS if key in values)])
    except (StopIteration, KeyError, TypeError, ValueError, CheckpointError):
        return None


def write_config(directory: Path, config: EncoderConfig, width: int, length: int) -> list[Path]:
    """Describe an encoder to sentence-transformers.

    Args:
        directory: the encoder's directory, with backbone and tokenizer.
        config: what to describe.
        width: dimensions of the backbone's token vectors.
        length: the one maximum length that sentence-transformers knows.

    Returns:
        Directories made for the projections' weights, in order; the weights are the caller's to
        write, as `linear.weight` and `linear.bias` in `model.safetensors`.
    """
    kinds = ["Transformer", "Pooling", *("Dense" for _ in config.projections)]
    kinds += ["Normalize"] if config.normalize else []
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"{LIBRARY}.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    for module in modules[1:]:
        (directory / str(module["path"])).mkdir()
    _write(directory / MODULES, modules)
    flags = {flag: name == config.pooling for name, flag in POOLING_FLAGS.items()}
    _write(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **flags, "include_prompt": True},
    )
    dense = [directory / f"{index + 2}_Dense" for index in range(len(config.projections))]
    for place, layer in zip(dense, config.projections, strict=True):
        _write(
            place / "config.json",
            {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "bias": layer.bias,
                "activation_function": f"torch.nn.modules.{TORCH_NAMES[layer.activation]}",
            },
        )
    _write(
        directory / LENGTHS,
        {"max_seq_length": length, "do_lower_case": config.lowercase},
    )
    _write(
        directory / PROMPTS,
        {
            "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if config.normalize else "dot",
        },
    )
    return dense


def write_router(directory: Path, query_tower: str) -> None:
    """Describe two towers to sentence-transformers: one for queries, one for documents.

    Args:
        directory: the documents' encoder, described already, with the queries' in it.
        query_tower: the folder of the queries' encoder.
    """
    routes = {
        "document": _modules(directory / MODULES),
        "query": [
            (kind, f"{query_tower}/{path}" if path else query_tower)
            for kind, path in _modules(directory / query_tower / MODULES)
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
    router = {"idx": 0, "name": "0", "path": "", "type": f"{LIBRARY}.Router"}
    _write(directory / MODULES, [router])


def _position(config: Path) -> int:
    """A module's place among the modules, by its folder: `2_Dense`."""
    return int(config.parent.name.partition("_")[0])


def _modules(path: Path) -> list[tuple[str, str]]:
    with _malformed(path):
        return [(str(module["type"]), str(module["path"])) for module in _json(path)]


def _pooling(path: Path) -> str:
    with _malformed(path):
        values = _json(path)
        named = values.get("pooling_mode")
        names = [named] if isinstance(named, str) else list(named or [])
        modes = [POOLING_NAMES.get(name, name) for name in names]
        modes += [mode for mode, flag in POOLING_FLAGS.items() if values.get(flag)]
        include_prompt = values.get("include_prompt", True)
    if not include_prompt:
        raise CheckpointError(f"{path}: pooling without the prompt's tokens is not supported")
    if len(modes) != 1 or modes[0] not in POOLING_FLAGS:
        raise CheckpointError(f"{path}: pooling {modes} is not supported; expected one mode")
    return modes[0]


def _projection(path: Path) -> ProjectionConfig:
    with _malformed(path):
        values = _json(path)
        activation = str(values.get("activation_function", "Tanh")).rsplit(".", 1)[-1].lower()
        return ProjectionConfig(
            int(values["in_features"]),
            int(values["out_features"]),
            values.get("bias", True),
            activation,
        )


def _length(path: Path, longest: int) -> tuple[int, bool]:
    """The maximum length, and whether text is lower-cased."""
    with _malformed(path):
        values = _json(path) if path.exists() else {}
        return int(values.get("max_seq_length") or longest), bool(values.get("do_lower_case"))


def _prompts(path: Path) -> tuple[str, str]:
    with _malformed(path):
        values = _json(path) if path.exists() else {}
        prompts: dict[str, str] = values.get("prompts") or {}
        default = prompts.get(values.get("default_prompt_name") or "", "")
        named = (prompts[name] for name in PASSAGE_PROMPT_NAMES if prompts.get(name))
        return prompts.get("query") or default, next(named, default)


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Turns what a file of unexpected contents leads to into one error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise CheckpointError(
            f"{path}: not as sentence-transformers writes it ({type(error).__name__}: {error})"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
