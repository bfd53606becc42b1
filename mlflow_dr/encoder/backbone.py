"""Backbones: sentence-transformers' Transformer module with more checks, and the tiny model.

The library itself gives random values to weights that are missing from the file, asks the hub about
adapters, and does not check that the tokenizer fits the backbone. Import this file late: it imports
sentence_transformers.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers.base.modules import Transformer

from mlflow_dr.encoder import lora
from mlflow_dr.encoder.checks import is_sentence_transformer, transformer_directories
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.files import adapter_chain
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import highest_id
from mlflow_dr.errors import CheckpointError, quoted

# without its files transformers makes a tokenizer of special tokens and, by kind, up to 2 others
DEFAULT_TOKENS = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
CLASSIFIER = "ForSequenceClassification"
MOST_LAYERS = 1000
MOST_EMBEDDED = 1 << 34
"""Most numbers in a table of token vectors; the largest known tables have 2^31."""

# the tiny model
LAYERS, WIDTH, HEADS, INNER = 2, 128, 2, 512
VOCABULARY_SIZE = 8192
ALPHABET_SIZE = 1000
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 512

_lock, _loading = threading.Lock(), threading.RLock()
_settings_before: list[tuple[int, bool]] = []
"""transformers' verbosity and progress bars before the first caller, once for each caller."""


class Backbone(Transformer):
    """A transformer and its tokenizer.

    Args:
        model_name_or_path: the directory of the weights.
        options: the other arguments of the library's module. Of `processor_kwargs`,
            `tokenizer_directory` is the directory of another tokenizer.

    Raises:
        CheckpointError: files are missing or damaged, or do not belong together.
    """

    def __init__(self, model_name_or_path: str, **options: Any) -> None:
        directory = Path(model_name_or_path)
        for name in ("model_kwargs", "processor_kwargs", "config_kwargs"):
            options[name] = dict(options.get(name) or {})
            directory = Path(model_name_or_path) / options[name].pop("subfolder", "")
        model_options = options["model_kwargs"]
        model_options |= {"dtype": torch.float32, "weights_only": True}
        *self._adapters, base = adapter_chain(directory, model_options.get("cache_dir"))
        if is_sentence_transformer(base) and base != directory:
            base = next(iter(transformer_directories(base)), base)
        self._base = base
        tokenizer = options["processor_kwargs"].pop("tokenizer_directory", directory)
        if self._adapters and not any((tokenizer / name).exists() for name in TOKENIZER_FILES):
            tokenizer = base
        with quiet_transformers(), loading_alone():
            # only the tokenizer is read from there; configuration and weights are the base's, below
            super().__init__(str(tokenizer), **options)
        _check_tokenizer(self.tokenizer, self.model, tokenizer)

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        config = transformers.AutoConfig.from_pretrained(self._base, **config_kwargs)
        check_size(config, self._base)
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
        if has_unused_pooler(config):
            options["add_pooling_layer"] = False
        loaded: Any = super()._load_model(
            str(self._base),
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
                f"{self._base}: {len(missing)} weights of the backbone are not in the file, such "
                f"as {missing[0]}; check that config.json ({config.model_type}) belongs to them"
            )
        for directory in reversed(self._adapters):
            model = lora.with_adapters(directory, model)
        return model


def check_size(config: Any, directory: Path) -> None:
    """Refuse a configuration that would take hours to build or fill the memory.

    Raises:
        CheckpointError: more layers or token vectors than any known model has.
    """
    names = ("num_hidden_layers", "vocab_size", "hidden_size")
    sizes = [getattr(config, name, 0) or 0 for name in names]
    if not all(isinstance(size, int) for size in sizes) or (
        sizes[0] > MOST_LAYERS or sizes[1] * sizes[2] > MOST_EMBEDDED
    ):
        raise CheckpointError(
            f"{directory / 'config.json'}: {', '.join(names)} are {quoted(sizes)}; expected at "
            f"most {MOST_LAYERS} layers and {MOST_EMBEDDED} numbers in the table of token vectors"
        )


def refuse_classifier(directory: Path) -> None:
    """Refuse a model that scores pairs or classes of texts instead of encoding single texts.

    Raises:
        CheckpointError: the configuration names such an architecture.
    """
    config = transformers.PreTrainedConfig.get_config_dict(directory)[0]
    kinds = config.get("architectures") or [""]
    if str(kinds[0]).endswith(CLASSIFIER):
        raise CheckpointError(
            f"{directory / 'config.json'}: {kinds[0]!r:.80} scores texts or pairs (a CrossEncoder, "
            "a classifier) and does not make vectors; pass --pooling to use its backbone as an "
            "encoder"
        )


def usual_pooling(config: Any) -> str:
    """The library's pooling for a backbone whose directory does not name one."""
    kinds = getattr(config, "architectures", None) or [""]
    looks_left = str(kinds[0]).endswith("ForCausalLM") and getattr(config, "is_causal", True)
    return "last" if looks_left else "mean"


def has_unused_pooler(config: Any) -> bool:
    """Whether AutoModel would add BERT's pooler, which the vectors do not depend on."""
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    return isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters


def _check_tokenizer(tokenizer: Any, model: Any, directory: Path) -> None:
    if tokenizer is None or not callable(getattr(tokenizer, "get_vocab", None)):
        raise CheckpointError(f"{directory}: no tokenizer of texts; expected an encoder of texts")
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) <= DEFAULT_TOKENS:
        raise CheckpointError(
            f"{directory}: the tokenizer has only special tokens; check that its files "
            "(tokenizer.json, vocab.txt or others) are there"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := highest_id(tokenizer)) >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer has token ids up to {highest}, but the backbone embeds "
            f"only {rows} tokens; tokenizer and weights do not belong together"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings; several threads may use it at once."""
    messages = transformers.utils.logging
    with _lock:  # the threads of a trainer and its publisher
        now = messages.get_verbosity(), messages.is_progress_bar_enabled()
        _settings_before.append(_settings_before[0] if _settings_before else now)
        messages.set_verbosity_error()
        messages.disable_progress_bar()
    try:
        yield
    finally:
        with _lock:
            level, had_bars = _settings_before.pop()
            if not _settings_before:
                messages.set_verbosity(level)
                if had_bars:
                    messages.enable_progress_bar()


@contextmanager
def loading_alone() -> Iterator[None]:
    """Load a model while no other thread does.

    transformers changes its own classes meanwhile, and two loads at once would leave them changed.
    """
    with _loading:
        yield


def tiny_encoder(texts: Iterable[str], config: EncoderConfig) -> Encoder:
    """`--model tiny`: a new two-layer BERT, with a vocabulary learnt from the training text.

    It learns to retrieve in a minute or two on a laptop's processor, and needs no download. Its
    weights depend on torch's random state, so set torch's seed before.

    Args:
        texts: the WordPiece vocabulary is learnt from them.
        config: the encoder's settings.
    """
    tokenizer = transformers.BertTokenizer(_vocabulary(list(texts)), model_max_length=POSITIONS)
    backbone = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            max_position_embeddings=POSITIONS,
            pad_token_id=tokenizer.pad_token_id,
        ),
        add_pooling_layer=False,
    )
    return Encoder(backbone, tokenizer, config)


def _vocabulary(texts: list[str]) -> dict[str, int]:
    """WordPiece's vocabulary, the same for the same texts in every process.

    The learner itself numbers the pieces of one character in the order of a hash map, which differs
    from process to process, and breaks ties between pieces by these numbers. So these pieces are
    given first, in a fixed order.
    """
    from tokenizers import BertWordPieceTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(learner.normalize(text))
    common = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET_SIZE]
    alphabet = sorted(character for character in common if not character.isspace())
    learner.train_from_iterator(
        texts,
        vocab_size=VOCABULARY_SIZE,
        show_progress=False,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)],
    )
    return learner.get_vocab()
