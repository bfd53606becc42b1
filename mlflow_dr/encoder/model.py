"""The encoder: a backbone gives token vectors, and a head makes one vector of them.

The head is a list of sentence-transformers' modules. Keys of their `features`: `token_embeddings`
is `(batch, length, width)`, `attention_mask` is `(batch, length)` with 1 for a token and 0 for
padding; `sentence_embedding` is `(batch, width)`.
Modules: https://sbert.net/docs/package_reference/sentence_transformer/modules.html.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.config import POOLINGS, EncoderConfig
from mlflow_dr.errors import UsageError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

log = logging.getLogger(__name__)

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
SUPPORTED = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
"""The modules of a head."""
UNLIMITED = 1_000_000
"""Tokenizers without a limit have a much larger `model_max_length`."""


class Encoder(nn.Module):
    """Text (as token ids) to vectors.

    Args:
        backbone: a Hugging Face model whose first output is the token vectors, or the library's
            `StaticEmbedding`, which gives the mean of its tokens' vectors.
        tokenizer: the backbone's tokenizer.
        config: its other settings.
        untied_query_encoder: encodes the queries, if they have weights of their own.
        head: sentence-transformers' modules after the backbone. They replace those that `config`
            describes, so pooling and normalisation of `settings` are theirs.

    Raises:
        UsageError: modules do not fit each other, or a length is beyond the backbone's positions.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        config: EncoderConfig,
        untied_query_encoder: Encoder | None = None,
        head: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.is_static = is_static(backbone)
        _check_lengths(backbone, config)
        modules = standard_head(config, self.width) if head is None else list(head)
        self.settings = replace(
            config,
            pooling=pooling_name(modules) or config.pooling,
            normalize=is_normalized(modules),
        )
        self.head = nn.ModuleList(modules)
        start = SENTENCE if self.is_static else TOKENS
        self.dimension = vector_dimension(modules, self.width, start)
        self.untied_query_encoder = untied_query_encoder
        if self.query_encoder.dimension != self.dimension:
            raise UsageError(
                f"queries become vectors of {self.query_encoder.dimension} dimensions and passages "
                f"of {self.dimension}; both need the same"
            )

    @property
    def width(self) -> int:
        """Dimensions of the backbone's token vectors."""
        if self.is_static:
            return int(self.backbone.embedding_dim)
        return int(self.backbone.config.hidden_size)

    @property
    def query_encoder(self) -> Encoder:
        """The encoder of queries: one with weights of its own, or this one."""
        return self if self.untied_query_encoder is None else self.untied_query_encoder

    @property
    def distinct_encoders(self) -> tuple[Encoder, ...]:
        """This encoder, and the encoder of queries if that is another one."""
        return (self,) if self.untied_query_encoder is None else (self, self.untied_query_encoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors of texts.

        Args:
            input_ids: `(batch, length) int64`, padded at the right.
            attention_mask: `(batch, length) int64`, 1 for tokens.

        Returns:
            `(batch, dimension) float32`, normalised if `settings.normalize`; fp64 for an encoder in
            fp64.
        """
        features: dict[str, Any] = {"attention_mask": attention_mask}
        if self.is_static:
            lengths = attention_mask.sum(dim=1)
            flat = {
                "input_ids": input_ids[attention_mask.bool()],
                "offsets": torch.cumsum(lengths, 0) - lengths,
            }
            features[SENTENCE] = self.backbone(flat)[SENTENCE]
        else:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
            features[TOKENS] = states
        return apply_head(self.head, features)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def sentence_transformer(self) -> SentenceTransformer:
        """A copy as sentence-transformers' object, on the same device."""
        from mlflow_dr.encoder.saving import as_sentence_transformer

        return as_sentence_transformer(self)


def is_static(backbone: Any) -> bool:
    """Whether a backbone is the library's table of token vectors, not a transformer."""
    return type(backbone).__name__ == "StaticEmbedding"


def is_adapted(backbone: Any) -> bool:
    """Whether a backbone has adapters."""
    return hasattr(backbone, "peft_config") and hasattr(backbone, "get_base_model")


def positions(backbone: Any) -> int | None:
    """The most tokens of a text that a backbone has positions for; None without a limit."""
    limit: int | None = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    if not limit or limit < 0:
        return None
    return limit - first_position(backbone)


def first_position(backbone: Any) -> int:
    """The position number of a text's first token.

    It is 0, but models like RoBERTa and MPNet count from the padding token's id + 1.
    """
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", None)
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            return padding + 1
    return 0


def shortest(*limits: Any, default: int) -> int:
    """The smallest of several limits of a text's length; None, 0 and huge numbers are no limits."""
    return min((int(limit) for limit in limits if limit and limit < UNLIMITED), default=default)


def _check_lengths(backbone: Any, config: EncoderConfig) -> None:
    """Refuse lengths for which the backbone has no positions."""
    limit = positions(backbone)
    for name in ("query_max_length", "passage_max_length"):
        length = getattr(config, name)
        if limit is not None and length > limit:
            raise UsageError(
                f"{name} is {length}, but the backbone has {limit} positions; choose a smaller "
                "length or another backbone"
            )


def with_settings(encoder: Encoder, changes: Mapping[str, Any]) -> Encoder:
    """An encoder with other settings, for queries and passages alike.

    Args:
        encoder: gives its backbone and weights.
        changes: fields of `EncoderConfig`.

    Raises:
        UsageError: a value is unknown or does not fit.
    """
    if not changes:
        return encoder
    settings = replace(encoder.settings, **changes)  # checks the values
    head = changed_head(
        encoder.head,
        settings.pooling if "pooling" in changes else None,
        settings.normalize if "normalize" in changes else None,
    )
    query_encoder = encoder.untied_query_encoder
    if query_encoder is not None:
        query_encoder = with_settings(query_encoder, changes)
    return Encoder(encoder.backbone, encoder.tokenizer, settings, query_encoder, head)


def with_projection(encoder: Encoder, in_features: int | None, out_features: int) -> Encoder:
    """An encoder with a linear layer after its pooling; an existing projection is kept instead.

    Args:
        encoder: what to extend.
        in_features: dimensions of the layer's input; the encoder's own dimensions when None.
        out_features: dimensions of the layer's output.

    Raises:
        UsageError: `in_features` is not the encoder's number of dimensions.
    """
    if projections_of(encoder.head):
        log.info(
            "the encoder already has a projection to %d dimensions, so none is added",
            encoder.dimension,
        )
        return encoder
    from sentence_transformers.sentence_transformer.modules import Dense

    head = list(encoder.head)
    layer = Dense(in_features or encoder.dimension, out_features, activation_function=nn.Identity())
    head.insert(len(head) - is_normalized(head), layer)
    query_encoder = encoder.untied_query_encoder
    if query_encoder is not None:
        query_encoder = with_projection(query_encoder, in_features, out_features)
    return Encoder(encoder.backbone, encoder.tokenizer, encoder.settings, query_encoder, head)


def untie(encoder: Encoder) -> None:
    """Give an encoder's queries weights of their own, which start as a copy of the passages'.

    An encoder whose queries already have weights of their own stays as it is.
    """
    if encoder.untied_query_encoder is not None:
        log.info("the encoders of queries and passages were loaded, each with its own weights")
        return
    log.info("one encoder was loaded: queries and passages both start from its weights")
    encoder.untied_query_encoder = copy.deepcopy(encoder)


def standard_head(config: EncoderConfig, width: int) -> list[nn.Module]:
    """The modules that a configuration describes: pooling, and normalisation if it is set.

    Args:
        config: describes them.
        width: dimensions of the backbone's token vectors.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize

    pooling = pooling_module(config.pooling, width)
    return [pooling, Normalize()] if config.normalize else [pooling]


def pooling_module(name: str, width: int) -> Pooling:
    """The library's module for one of our poolings, or for several joined by `+`."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    modes: Any = [POOLINGS[mode] for mode in name.split("+")]
    return Pooling(width, modes)


def changed_head(
    head: Iterable[nn.Module], pooling: str | None, normalize: bool | None
) -> list[nn.Module]:
    """A head with another pooling or normalisation.

    Args:
        head: the modules that were loaded.
        pooling: one of `POOLINGS`; None keeps the head's own.
        normalize: whether vectors get length 1 in the end; None keeps the head's own.

    Raises:
        UsageError: the head has no pooling to replace.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    changed = list(head)
    if pooling is not None:
        changed = [
            pooling_module(pooling, int(module.embedding_dimension))
            if isinstance(module, Pooling)
            else module
            for module in changed
        ]
        if not any(isinstance(module, Pooling) for module in changed):
            raise UsageError(f"pooling {pooling!r}: this encoder has no pooling to replace")
    if normalize is not None and normalize != is_normalized(changed):
        if normalize:
            return [*changed, Normalize()]
        while is_normalized(changed):
            changed.pop()
    return changed


def is_normalized(head: Sequence[nn.Module]) -> bool:
    """Whether the last module gives vectors length 1."""
    last = head[-1] if head else None
    return type(last).__name__ == "Normalize" and output_of(last) == SENTENCE


def pooling_name(head: Iterable[nn.Module]) -> str | None:
    """Our name of a head's pooling, several joined by `+`; None without a pooling."""
    names = {theirs: ours for ours, theirs in POOLINGS.items()}
    for module in head:
        if type(module).__name__ == "Pooling":
            modes: Any = module.pooling_mode
            return "+".join(names[mode] for mode in ([modes] if isinstance(modes, str) else modes))
    return None


def projections_of(head: Iterable[Any]) -> list[Any]:
    """The linear layers after the pooling."""
    return [
        module
        for module in head
        if type(module).__name__ == "Dense" and input_of(module) == SENTENCE
    ]


def input_of(module: Any) -> str:
    """Which of the features a module reads."""
    if type(module).__name__ == "Pooling":
        return TOKENS
    return str(getattr(module, "module_input_name", SENTENCE))


def output_of(module: Any) -> str:
    """Which of the features a module writes."""
    return str(getattr(module, "module_output_name", SENTENCE))


def vector_dimension(head: Iterable[Any], width: int, start: str = TOKENS) -> int:
    """Dimensions of the vectors that a head gives.

    Args:
        head: the modules.
        width: dimensions of the head's input.
        start: which of the features is the head's input.

    Raises:
        UsageError: the modules do not fit each other, or do not give a vector.
    """
    widths = {start: width}
    for module in head:
        for feature in (input_of(module), output_of(module)):
            if feature not in (TOKENS, SENTENCE):
                raise UsageError(
                    f"module {type(module).__name__} works on {feature!r:.80}; expected {TOKENS} "
                    f"or {SENTENCE}"
                )
        given = widths.get(input_of(module))
        if given is None:
            raise UsageError(
                f"module {type(module).__name__} reads {input_of(module)}, but no module before "
                "it gives that"
            )
        wanted = getattr(module, "in_features", None) or getattr(module, "dimension", None)
        if wanted is not None and wanted != given:
            raise UsageError(
                f"a projection takes {wanted} dimensions, but the layer before it gives {given}"
            )
        if type(module).__name__ == "Pooling":
            modes = module.pooling_mode
            given *= 1 if isinstance(modes, str) else len(modes)
        widths[output_of(module)] = int(getattr(module, "out_features", given))
    if SENTENCE not in widths:
        raise UsageError("token vectors are not pooled: the encoder has no Pooling module")
    return widths[SENTENCE]


def apply_head(head: Iterable[nn.Module], features: dict[str, Any]) -> Tensor:
    """The vectors of a batch, `(batch, dimension)`; fp32, or fp64 for token vectors in fp64.

    Half-precision numbers become fp32 before each module without weights, so poolings and
    normalisation compute in fp32. A linear layer computes in the format of its own weights.
    """
    for module in head:
        name = input_of(module)
        weight = next(module.parameters(), None)
        values = features[name]
        features[name] = at_least_fp32(values) if weight is None else values.to(weight.dtype)
        features = module(features)
    return at_least_fp32(features[SENTENCE])


def at_least_fp32(values: Tensor) -> Tensor:
    """Half-precision numbers as fp32; others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
