"""The head of an encoder: sentence-transformers' modules from token vectors to a text's vector.

Keys of `features`: `token_embeddings` is `(batch, length, width)`, `attention_mask` is
`(batch, length)` with 1 for a token and 0 for padding; `sentence_embedding` is `(batch, width)`.
Modules: https://sbert.net/docs/package_reference/sentence_transformer/modules.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.config import POOLINGS, EncoderConfig
from mlflow_dr.errors import UsageError

if TYPE_CHECKING:
    from sentence_transformers.sentence_transformer.modules import Pooling

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
SUPPORTED = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")


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
