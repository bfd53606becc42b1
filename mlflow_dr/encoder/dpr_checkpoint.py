"""Checkpoints of DPR and GC-DPR: two BERTs in one file of `torch.save`, read without running code.

transformers has the same encoders in two directories, `DPRQuestionEncoder` and `DPRContextEncoder`.

`model_dict` has `question_model.*` and `ctx_model.*`, and a projection `encode_proj.*` if there is
one; `encoder_params` has the settings: flat, or since 2021 an object of OmegaConf.
Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlflow_dr.encoder.checks import checkpoint_errors
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.model import Encoder, positions, projections_of, with_projection
from mlflow_dr.errors import CheckpointError, UsageError, one_line
from mlflow_dr.files import atomic_write

WEIGHTS, SETTINGS = "model_dict", "encoder_params"
QUERIES, PASSAGES = "question_model.", "ctx_model."
PROJECTION = "encode_proj."
UNUSED = ("pooler.", "embeddings.position_ids")
SEPARATOR = " [SEP] "
USUAL_LENGTH = 512
TRANSFORMERS = ("question_encoder.", "ctx_encoder.")
SIDES = (("queries", QUERIES), ("passages", PASSAGES))


class DprCheckpoint(NamedTuple):
    """A checkpoint of a bi-encoder.

    Attributes:
        file: its path, for messages.
        state: weights by DPR's names.
        settings: `encoder_params`, flat: `pretrained_model_cfg`, `sequence_length`,
            `projection_dim`, `do_lower_case`; empty where there are none.
    """

    file: str
    state: dict[str, Tensor]
    settings: dict[str, Any]

    def backbone_directory(self, backbone: str | None) -> Path:
        """The directory of the model that it was trained from.

        Args:
            backbone: directory or hub name; as the checkpoint says when None.

        Raises:
            UsageError: the checkpoint names none, or there is no such model.
        """
        name = backbone or self.settings.get("pretrained_model_cfg")
        if not name:
            raise UsageError(
                f"{self.file} does not name the model that it was trained from; give --backbone"
            )
        return encoder_directory(str(name))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights of one encoder.

        Raises:
            CheckpointError: there are none.
        """
        part = {
            name.removeprefix(prefix): value
            for name, value in self.state.items()
            if name.startswith(prefix)
        }
        if not part:
            raise CheckpointError(
                f"{self.file}: {WEIGHTS} has no {prefix}*; expected a bi-encoder of DPR"
            )
        return part


class _Inert:
    """Stands for a class of OmegaConf: it keeps its state and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _InertDict(dict[Any, Any]):
    """Stands for a dictionary; what it is made from is ignored."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(
        (type(name.rpartition(".")[2], (_Inert,), {}), name)
        for name in (
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            *(
                f"omegaconf.nodes.{kind}Node"
                for kind in ("Any", "Integer", "Float", "String", "Boolean")
            ),
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "typing.Any",
        )
    ),
    (_InertDict, "collections.defaultdict"),
    *((type(kind.__name__, (_Inert,), {}), f"builtins.{kind.__name__}") for kind in (dict, list)),
]
"""What may be named in a checkpoint instead of running; none of it does anything."""


def read_dpr_checkpoint(path: Path) -> DprCheckpoint:
    """Read a checkpoint of a bi-encoder; of its optimizer nothing is read into memory.

    Raises:
        UsageError: there is no such file.
        CheckpointError: the file is damaged, of another kind, or would run code.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(INERT):
            content: Any = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{path}: the file is damaged, or has objects whose code would run; if you trust it, "
            f"save only its weights: torch.save({{'{WEIGHTS}': torch.load(FILE, "
            f"weights_only=False)['{WEIGHTS}']}}, NEW_FILE) ({type(error).__name__})"
        ) from error
    state = content.get(WEIGHTS) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path}: no tensors in {WEIGHTS}; expected a checkpoint of DPR")
    return DprCheckpoint(str(path), state, _flat(_plain(content.get(SETTINGS))))


def _plain(value: Any) -> Any:
    """A value without stand-ins: what a node of OmegaConf holds."""
    if isinstance(value, _Inert):
        held = vars(value)
        return _plain(held.get("_content", held.get("_val")))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _flat(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {}
    inner = settings.get("encoder")
    return {**(inner if isinstance(inner, dict) else {}), **settings}


def load_dpr_weights(
    checkpoint: DprCheckpoint, encoder: Encoder, backbone_flag: str = "--pretrained_model_cfg"
) -> None:
    """Replace an encoder's weights by those of a checkpoint.

    Args:
        checkpoint: of a bi-encoder.
        encoder: an encoder with separate weights for queries.
        backbone_flag: names the model that it was trained from, for messages.

    Raises:
        UsageError: the encoder has another shape.
        CheckpointError: the checkpoint is of another kind.
    """
    if encoder.untied_query_encoder is None:
        raise UsageError(
            f"{checkpoint.file} has separate encoders of queries and passages; add --untie_encoder"
        )
    for prefix, side in ((QUERIES, encoder.untied_query_encoder), (PASSAGES, encoder)):
        _load(checkpoint, prefix, side, backbone_flag)


def _load(checkpoint: DprCheckpoint, prefix: str, encoder: Encoder, backbone_flag: str) -> None:
    part, file = checkpoint.part(prefix), checkpoint.file
    layer = {
        name.removeprefix(PROJECTION): value
        for name, value in part.items()
        if name.startswith(PROJECTION)
    }
    weights = {
        name: value for name, value in part.items() if not name.startswith((PROJECTION, *UNUSED))
    }
    projections = projections_of(encoder.head)
    if bool(layer) != bool(projections):
        size = len(layer["weight"]) if "weight" in layer else 0
        raise UsageError(f"{file} needs --projection_dim {size}")
    advice = f"name the model that it was trained from by {backbone_flag}"
    try:
        missing, unexpected = encoder.backbone.load_state_dict(weights, strict=False)
        if layer:
            projections[0].linear.load_state_dict(layer)
    except RuntimeError as error:
        raise UsageError(
            f"{file}: its weights do not have the model's shapes; {advice} "
            f"({one_line(error)[:200]})"
        ) from error
    missing = [name for name in missing if not name.startswith(UNUSED)]
    if missing or unexpected:
        what, name = ("lacks", missing[0]) if missing else ("has an unknown", unexpected[0])
        raise UsageError(f"{file} {what} {name}; {advice}")


def import_dpr(path: Path, backbone: str | None = None, length: int | None = None) -> Encoder:
    """The encoder of a checkpoint, which gives the vectors that DPR's own programs give.

    Args:
        path: the checkpoint.
        backbone: directory or hub name of the model that it was trained from, for its
            configuration and tokenizer; as the checkpoint says when None.
        length: the most tokens of a text; as the checkpoint says when None, else 512.

    Raises:
        UsageError: no such file or model, or the checkpoint is not of this model.
        CheckpointError: the checkpoint is damaged, of another kind, or would run code.
    """
    checkpoint = read_dpr_checkpoint(path)
    directory = checkpoint.backbone_directory(backbone)
    return _encoder(checkpoint, (directory, directory), length)


def import_dpr_encoders(queries: str, passages: str, length: int | None = None) -> Encoder:
    """The encoder of two directories of transformers.

    Args:
        queries: directory or hub name of a `DPRQuestionEncoder`.
        passages: of a `DPRContextEncoder`.
        length: the most tokens of a text; 512 when None.

    Raises:
        UsageError: no such directory, or one of another kind.
        CheckpointError: the weights are damaged.
    """
    state: dict[str, Tensor] = {}
    directories = (encoder_directory(queries), encoder_directory(passages))
    for directory, theirs, ours in zip(directories, TRANSFORMERS, (QUERIES, PASSAGES), strict=True):
        weights = _transformers_weights(directory)
        part = {
            name.removeprefix(theirs).removeprefix("bert_model."): value
            for name, value in weights.items()
            if name.startswith(theirs)
        }
        if not part:
            raise UsageError(
                f"{directory}: expected {theirs}*, the weights of a DPR encoder of transformers; "
                "name the encoder of questions, and by --passages that of passages"
            )
        state |= {f"{ours}{name}": value for name, value in part.items()}
    checkpoint = DprCheckpoint(f"{queries} and {passages}", state, {})
    return _encoder(checkpoint, directories, length)


def _transformers_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with checkpoint_errors(directory):
        if (directory / "model.safetensors").is_file():
            return load_file(directory / "model.safetensors")
        weights: dict[str, Tensor] = torch.load(
            directory / "pytorch_model.bin", map_location="cpu", weights_only=True
        )
    return weights


def _encoder(
    checkpoint: DprCheckpoint, directories: tuple[Path, Path], length: int | None
) -> Encoder:
    """An encoder with the weights of a checkpoint.

    Args:
        checkpoint: has the weights.
        directories: configuration and tokenizer of the question's BERT and of the passage's.
        length: the most tokens of a text, if it was given.
    """
    size = len(checkpoint.part(PASSAGES).get(f"{PROJECTION}weight", ()))
    queries, passages = (
        _untrained(directory, checkpoint.settings, length, size) for directory in directories
    )
    encoder = Encoder(
        passages.backbone, passages.tokenizer, passages.settings, queries, list(passages.head)
    )
    load_dpr_weights(checkpoint, encoder, "--backbone")
    return encoder.eval()


def _untrained(
    directory: Path, settings: Mapping[str, Any], length: int | None, size: int
) -> Encoder:
    """One encoder with DPR's settings, whose weights are still random."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig

    options = {"do_lower_case": True} if settings.get("do_lower_case") else {}
    try:
        config = AutoConfig.from_pretrained(directory)
        if config.model_type == "dpr":
            config = BertConfig.from_dict({**config.to_dict(), "model_type": "bert"})
        if config.model_type != "bert":
            raise UsageError(f"{directory} is a {config.model_type}; expected a BERT, as DPR's are")
        model = AutoModel.from_config(config, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, tokenizer_type="bert", **options)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory}: no configuration and tokenizer of a BERT ({one_line(error)})"
        ) from error
    longest = int(length or settings.get("sequence_length") or USUAL_LENGTH)
    longest = min(longest, positions(model) or longest)
    encoder = Encoder(
        model,
        tokenizer,
        EncoderConfig(
            "cls",
            query_max_length=longest,
            passage_max_length=longest,
            title_separator=SEPARATOR,
            title_as_pair=True,
        ),
    )
    return with_projection(encoder, None, size) if size else encoder


def export_dpr(encoder: Encoder, path: Path, backbone: str) -> None:
    """Write an encoder as a checkpoint that DPR and GC-DPR load.

    Args:
        encoder: its backbones are BERTs, its pooling is the first token.
        path: the file.
        backbone: what DPR's programs are told that it was trained from: a directory or hub name.

    Raises:
        UsageError: DPR's programs cannot express the encoder.
    """
    state: dict[str, Tensor] = {}
    size = 0
    for (_, prefix), side in zip(SIDES, (encoder.query_encoder, encoder), strict=True):
        size = _check_exportable(side)
        weights = {f"{prefix}{name}": value for name, value in side.backbone.state_dict().items()}
        width = side.width
        pooler = {"weight": torch.eye(width), "bias": torch.zeros(width)}
        weights |= {f"{prefix}pooler.dense.{name}": value for name, value in pooler.items()}
        for layer in projections_of(side.head):
            items = layer.linear.state_dict().items()
            weights |= {f"{prefix}{PROJECTION}{name}": value for name, value in items}
        state |= {name: value.contiguous().cpu() for name, value in weights.items()}
    settings = encoder.settings
    tokenizer = encoder.tokenizer
    params = {
        "do_lower_case": tokenizer("Ab")["input_ids"] == tokenizer("ab")["input_ids"],
        "pretrained_model_cfg": backbone,
        "encoder_model_type": "hf_bert",
        "pretrained_file": None,
        "projection_dim": size,
        "sequence_length": max(settings.query_max_length, settings.passage_max_length),
    }
    content = {
        WEIGHTS: state,
        "optimizer_dict": {},
        "scheduler_dict": {},
        "offset": 0,
        "epoch": 0,
        SETTINGS: params,
    }
    with atomic_write(path) as partial:
        torch.save(content, partial)


def _check_exportable(encoder: Encoder) -> int:
    """Refuse an encoder that DPR's programs would not compute; dimensions of its projection."""
    from mlflow_dr.encoder.model import is_adapted

    settings, kinds = encoder.settings, [type(module).__name__ for module in encoder.head]
    faults = {
        "its backbone is no BERT": encoder.is_static
        or encoder.backbone.config.model_type != "bert",
        "it has adapters": is_adapted(encoder.backbone),
        f"its pooling is {settings.pooling}": settings.pooling != "cls",
        "its vectors are normalised": settings.normalize,
        "it has prompts": bool(settings.query_prompt or settings.passage_prompt),
        f"its modules are {', '.join(kinds)}": not set(kinds) <= {"Pooling", "Dense"}
        or kinds.count("Dense") > 1,
        f"titles are separated by {settings.title_separator!r}": not settings.title_as_pair
        and settings.title_separator != SEPARATOR,
    }
    if fault := next((fault for fault, is_fault in faults.items() if is_fault), ""):
        raise UsageError(f"DPR's programs cannot use this encoder: {fault}")
    layers = projections_of(encoder.head)
    return len(layers[0].linear.weight) if layers else 0
