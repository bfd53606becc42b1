"""Checkpoints of other people's models: of sentence-transformers, of transformers, a directory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlflow_dr import compat
from mlflow_dr.encoder import checks
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import CONFIG, encoder_from_model, load_encoder
from mlflow_dr.encoder.model import Encoder, positions, shortest
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.training.publishing import CheckpointSource, EncoderSource

BACKBONE_CONFIG = "config.json"
WEIGHTS = "model*.safetensors"
# files that trainers write to resume from; they are not part of the model, and twice its size
TRAINER_FILES = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json"),
    *("training_args.bin", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model*.bin"),
    *("mlflow_dr_*.json", "*.partial", ".*", "__pycache__"),
)
NEEDED = ("pooling", "normalize")


class SentenceTransformerSource:
    """A SentenceTransformer, written by its own `save`.

    `save` writes the current weights of a model, which training changes meanwhile. So a copy of the
    model without weights is kept, which gets the weights of each publication.

    Args:
        model: the SentenceTransformer.

    Raises:
        UsageError: our encoder does not support a module of the model, or it cannot be copied.
    """

    def __init__(self, model: Any) -> None:
        try:
            encoder_from_model(model, "this SentenceTransformer")
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        if model.similarity_fn_name not in checks.SIMILARITIES:
            raise UsageError(
                f"this SentenceTransformer compares by {model.similarity_fn_name}; expected "
                f"{' or '.join(checks.SIMILARITIES)} (set its similarity_fn_name)"
            )
        for module in model.modules():
            _refuse_adapters(module)
        self._model = model
        self._shell: Any = _without_weights(model)

    def state(self) -> Mapping[str, Tensor]:
        """The model's weights."""
        return self._model.state_dict()

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write the model as sentence-transformers does, without a model card."""
        from mlflow_dr.encoder.backbone import quiet_transformers

        self._shell.load_state_dict(state, assign=True)
        with quiet_transformers():
            self._shell.save(str(directory), create_model_card=False)
        check_directory(directory)


class DirectorySource:
    """The directory of an encoder; it must not change until it is published."""

    def __init__(self, directory: Path) -> None:
        check_directory(directory)
        self._directory = directory

    def state(self) -> Mapping[str, Tensor]:
        """Nothing; the weights are in the directory."""
        return {}

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Copy the directory, without files that trainers write to resume from."""
        shutil.copytree(self._directory, directory, ignore=shutil.ignore_patterns(*TRAINER_FILES))


def source_of(model: Any, tokenizer: Any = None, **settings: Any) -> CheckpointSource:
    """The source of checkpoints of a model.

    Args:
        model: our Encoder, a SentenceTransformer, a Hugging Face model or a directory; it may be
            wrapped by DistributedDataParallel or torch.compile.
        tokenizer: the tokenizer of a Hugging Face model.
        settings: fields of `EncoderConfig`, for a Hugging Face model or the directory of a bare
            backbone, which do not define how vectors are made.

    Raises:
        UsageError: this kind of model cannot be published, or settings are missing, unknown or not
            allowed for it.
        CheckpointError: `load_encoder` would not read the directory.
    """
    from transformers import PreTrainedModel

    model = unwrapped(model)
    if isinstance(model, str | Path):
        directory = Path(model).expanduser()
        if _is_bare(directory):
            _check_settings(settings, str(directory))
            return EncoderSource(load_encoder(directory, safetensors_only=True, **settings))
        _refuse_settings(tokenizer, settings, f"the directory {directory}")
        return DirectorySource(directory)
    if isinstance(model, nn.Module):
        _refuse_sharded(model)
    if isinstance(model, Encoder):
        _refuse_settings(tokenizer, settings, "an Encoder")
        return EncoderSource(model)
    if any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__):
        _refuse_settings(tokenizer, settings, "a SentenceTransformer")
        return SentenceTransformerSource(model)
    if isinstance(model, PreTrainedModel):
        return EncoderSource(_encoder(model, tokenizer, settings))
    raise UsageError(
        f"a {type(model).__name__} cannot be published; expected an mlflow_dr Encoder, a "
        "SentenceTransformer, a Hugging Face PreTrainedModel (perhaps an attribute of yours), or "
        "the directory of one"
    )


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := compat.uncompiled(model)) is not model:
            model = inner
        else:
            return model


def check_directory(directory: Path) -> None:
    """Refuse a directory that a validator would refuse, without reading weights.

    Raises:
        UsageError: there is no such directory.
        CheckpointError: it has no safetensors of a backbone, or our encoder does not support it.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: not a directory; expected the directory of an encoder")
    if (directory / CONFIG).exists():
        return
    backbones = [directory]
    if checks.is_sentence_transformer(directory):
        checks.check_description(directory, safetensors_only=True)
        backbones = checks.transformer_directories(directory)
    for backbone in backbones:
        if not (backbone / BACKBONE_CONFIG).exists() or not any(backbone.glob(WEIGHTS)):
            raise CheckpointError(
                f"{backbone}: {BACKBONE_CONFIG} or {WEIGHTS} is missing; save the complete model "
                "(adapters merged) there, as safetensors"
            )


def _is_bare(directory: Path) -> bool:
    """Whether it is the directory of a backbone that does not define how vectors are made."""
    names = {path.name for path in directory.glob("*.json")}
    return BACKBONE_CONFIG in names and not names & {CONFIG, checks.MODULES}


def _encoder(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Encoder:
    """An encoder around a Hugging Face model; it shares the weights."""
    _refuse_adapters(model)
    name = f"a {type(model).__name__}"
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise UsageError(f"{name} needs its tokenizer to be published; give tokenizer=")
    _check_settings(settings, name)
    longest = shortest(tokenizer.model_max_length, positions(model), default=0)
    lengths = {"query_max_length": longest, "passage_max_length": longest} if longest else {}
    return Encoder(model.base_model, tokenizer, EncoderConfig(**{**lengths, **settings}))


def _check_settings(settings: Mapping[str, Any], name: str) -> None:
    allowed = {field.name for field in fields(EncoderConfig)} - {"projections"}
    if unknown := sorted(set(settings) - allowed):
        raise UsageError(
            f"unknown setting {unknown[0]!r}; expected one of {', '.join(sorted(allowed))}"
        )
    if missing := [field for field in NEEDED if field not in settings]:
        raise UsageError(
            f"{name} does not define how its vectors are made; give {' and '.join(missing)}, "
            "such as pooling='mean', normalize=True, as in your loss"
        )


def _refuse_settings(tokenizer: Any, settings: Mapping[str, Any], name: str) -> None:
    given = [*(["tokenizer"] if tokenizer is not None else []), *settings]
    if given:
        raise UsageError(f"{name} already defines how its vectors are made; leave {given[0]} out")


def _refuse_adapters(module: Any) -> None:
    if compat.has_adapters(module):
        raise UsageError(
            "a model with adapters would be saved without its base; merge a copy of it "
            "(`merge_and_unload`), save the copy to a directory and publish the directory"
        )


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which each process has only a part (FSDP, ZeRO-3)."""
    for weight in model.parameters():
        if compat.is_sharded(weight):
            raise UsageError(
                "the weights are sharded (FSDP, ZeRO-3); let your trainer save the complete model "
                "to a directory and publish the directory"
            )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: structure and settings, no memory."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    if card := getattr(model, "model_card_data", None):
        memo[id(card)] = None  # it refers to the trainer, and so to the data and the optimizer
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(
            f"this {type(model).__name__} cannot be copied ({error}); save it to a directory and "
            "publish the directory"
        ) from error
