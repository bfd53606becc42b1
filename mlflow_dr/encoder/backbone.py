"""The library's Transformer module, with what a directory from somebody else needs on top.

Weights that are not in the file, adapters, tokenizers that do not fit: the library loads the first
with random values, asks the hub about the second and does not look at the third. Import this file
late: it imports sentence_transformers.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers.base.modules import Transformer

from mlflow_dr.encoder import lora
from mlflow_dr.encoder.description import (
    is_sentence_transformer,
    transformer_directories,
)
from mlflow_dr.encoder.quiet import quiet_transformers
from mlflow_dr.encoder.tokenize import highest_id
from mlflow_dr.errors import CheckpointError, MlflowDrError

# without its files transformers makes up a tokenizer of special tokens and, by kind, up to 2 others
MADE_UP_TOKENS = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
CLASSIFIER = "ForSequenceClassification"
MOST_LAYERS = 1000
MOST_EMBEDDED = 1 << 34
"""Numbers in a table of token vectors at most; the largest known ones have 2^31."""


class Backbone(Transformer):
    """A transformer and its tokenizer, loaded whole or not at all.

    Args:
        model_name_or_path: the directory.
        tokenizer_name_or_path: another directory with the tokenizer.
        options: what the library's module takes.

    Raises:
        CheckpointError: files that are missing, damaged or do not belong together.
    """

    tokenizer_place: str | None = None
    """The directory of the tokenizer, where it is another one; for a class derived from this."""

    def __init__(
        self,
        model_name_or_path: str,
        *,
        tokenizer_name_or_path: str | None = None,
        **options: Any,
    ) -> None:
        directory = Path(model_name_or_path)
        for part in ("model_kwargs", "processor_kwargs", "config_kwargs"):
            values = dict(options.get(part) or {})
            directory = Path(model_name_or_path) / values.pop("subfolder", "")
            options[part] = values
        *self._adapters, base = lora.adapter_chain(
            directory, options["model_kwargs"].get("cache_dir")
        )
        self._place = base
        if is_sentence_transformer(base) and base != directory:
            self._place = next(iter(transformer_directories(base)), base)
        words = Path(self.tokenizer_place or tokenizer_name_or_path or directory)
        if self._adapters and not any((words / name).exists() for name in TOKENIZER_FILES):
            words = self._place  # adapters alone go with their base's tokenizer
        options["model_kwargs"] |= {"dtype": torch.float32, "weights_only": True}
        named = None if words == directory else str(words)
        with _backbone_errors(directory), quiet_transformers(), _without_notes(named is not None):
            super().__init__(str(directory), tokenizer_name_or_path=named, **options)
        _check_tokenizer(self.tokenizer, self.model, words)

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        config = transformers.AutoConfig.from_pretrained(self._place, **config_kwargs)
        check_size(config, self._place)
        return config, False

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **options: Any,
    ) -> Any:
        if _has_unused_pooler(config):
            options["add_pooling_layer"] = False
        loaded: Any = super()._load_model(
            str(self._place),
            transformer_task,
            config,
            backend,
            False,
            output_loading_info=True,
            **options,
        )
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise CheckpointError(
                f"{self._place}: {len(missing)} weights of the backbone are not in the file, such "
                f"as {missing[0]}; is it a checkpoint of this architecture ({config.model_type})?"
            )
        for directory in reversed(self._adapters):
            model = lora.with_adapters(directory, model)
        return model


def check_size(config: Any, directory: Path) -> None:
    """Refuse a configuration that would be built for hours or fill the memory before it fails.

    Raises:
        CheckpointError: more layers or token vectors than any known model has.
    """
    layers = getattr(config, "num_hidden_layers", 0) or 0
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        raise CheckpointError(
            f"{directory / 'config.json'}: num_hidden_layers is {layers!r:.80}; expected a number "
            f"up to {MOST_LAYERS}"
        )
    sizes = [getattr(config, name, 0) or 0 for name in ("vocab_size", "hidden_size")]
    if not all(isinstance(size, int) for size in sizes) or sizes[0] * sizes[1] > MOST_EMBEDDED:
        raise CheckpointError(
            f"{directory / 'config.json'}: vocab_size and hidden_size are {sizes!r:.80}; expected "
            f"numbers whose product is at most {MOST_EMBEDDED}"
        )


def refuse_classifier(directory: Path) -> None:
    """Refuse a model that scores pairs or classes of texts, which is no encoder of single texts.

    Raises:
        CheckpointError: its configuration names such an architecture.
    """
    config = transformers.PreTrainedConfig.get_config_dict(directory)[0]
    kinds = config.get("architectures") or [""]
    if str(kinds[0]).endswith(CLASSIFIER):
        raise CheckpointError(
            f"{directory / 'config.json'}: {kinds[0]!r:.80} scores texts or pairs (a CrossEncoder, "
            "a classifier) and makes no vectors of them; to use its backbone all the same, say how "
            "with --pooling"
        )


def usual_pooling(config: Any) -> str:
    """The pooling that the library takes for a backbone whose directory names none."""
    kinds = getattr(config, "architectures", None) or [""]
    looks_left = str(kinds[0]).endswith("ForCausalLM") and getattr(config, "is_causal", True)
    return "last" if looks_left else "mean"


def _has_unused_pooler(config: Any) -> bool:
    """Whether AutoModel would add BERT's pooler, whose weights no vector here depends on."""
    kind = transformers.AutoModel._model_mapping.get(type(config), None)
    return isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters


def _check_tokenizer(tokenizer: Any, model: Any, words: Path) -> None:
    if tokenizer is None or not callable(getattr(tokenizer, "get_vocab", None)):
        raise CheckpointError(f"{words}: no tokenizer for texts; is it an encoder of texts?")
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) <= MADE_UP_TOKENS:
        raise CheckpointError(
            f"{words}: the tokenizer has special tokens only; are its files (tokenizer.json, "
            "vocab.txt or others) missing?"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := highest_id(tokenizer)) >= rows:
        raise CheckpointError(
            f"{words}: the tokenizer has token ids up to {highest}, but the backbone embeds "
            f"only {rows} tokens; tokenizer and weights do not belong together"
        )


@contextmanager
def _backbone_errors(directory: Path) -> Iterator[None]:
    """Turns whatever files from elsewhere lead to into one error that names the directory."""
    try:
        yield
    except (MlflowDrError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{directory}: the pickled weights are damaged or hold more than weights, and no code "
            "of theirs is run; save them as safetensors"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{directory}: the backbone cannot be loaded: {reason}") from error


@contextmanager
def _without_notes(wanted: bool) -> Iterator[None]:
    """Without the library's note on a tokenizer from another directory, where that is wanted."""
    log = logging.getLogger("sentence_transformers")
    level = log.level
    if wanted:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
