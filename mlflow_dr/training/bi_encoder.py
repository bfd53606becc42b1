"""Vectors of a training batch, with as little padding as its device is fast with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_dr.devices import on_device
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.packed import can_pack, encode_packed
from mlflow_dr.encoder.varlen import PackedTexts, has_varlen
from mlflow_dr.errors import one_line
from mlflow_dr.retrieval.encode import plan_batches
from mlflow_dr.training.batches import (
    LENGTHS,
    PASSAGE,
    QUERY,
    Texts,
    cut,
    inverse,
    with_lengths,
)

log = logging.getLogger(__name__)

# a CPU is as fast with small batches, and they have less padding
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
LEAST_GAIN = 0.9  # the share of a batch's padded size from which a GPU gains by several batches
PROOF_TEXTS = 5
LEAST_LIKENESS = 0.99  # cosine similarity of vectors and gradients, in half precision
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""transformers' names for the dropout of attention."""


class BiEncoder(nn.Module):
    """Makes vectors of queries and passages, with shared or separate weights.

    One call takes both, because DistributedDataParallel reduces gradients once per call.

    Args:
        encoder: the encoder; queries have separate weights if it has a query encoder.
        in_batches: whether texts may be encoded in batches of similar length. Processes that
            gather weights in each call (FSDP) must make equally many.
        packs: whether texts may lie end to end where a GPU computes their attention, and the first
            batch of each role proves it.
    """

    def __init__(self, encoder: Encoder, in_batches: bool = True, packs: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self._encode = encode_in_batches if in_batches else _encode
        self._packs = packs
        self._proven: dict[str, bool] = {}

    def forward(self, texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        """Role -> vectors of its texts, `(n_texts, dim)`."""
        encoders = {QUERY: self.encoder.query_encoder, PASSAGE: self.encoder}
        return {role: self._vectors(role, encoders[role], texts[role]) for role in texts}

    def _vectors(self, role: str, encoder: Encoder, texts: Texts) -> Tensor:
        if not self._packs or not can_train_packed(encoder, texts["input_ids"].device):
            return self._encode(encoder, texts)
        if role not in self._proven:
            reason = packing_defect(encoder, texts)
            self._proven[role] = not reason
            if reason:
                log.warning("each %s is padded in training, which is slower (%s)", role, reason)
        return (encode_end_to_end if self._proven[role] else self._encode)(encoder, texts)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, not keep them. Trainer calls this."""
        self._packs = False  # the attention of packed texts is set in the forward pass only
        for encoder in self.encoder.distinct_encoders:
            encoder.backbone.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
            )


def encode_in_batches(encoder: nn.Module, texts: Texts) -> Tensor:
    """The vectors of texts, `(n_texts, dim)`, in batches of similar length where that is faster.

    Args:
        encoder: called with `input_ids` and `attention_mask`.
        texts: texts; a GPU does not wait if they have their lengths.
    """
    texts, ids = with_lengths(texts), texts["input_ids"]
    batches = batches_of_similar_length(texts[LENGTHS], ids.shape[1], ids.device.type)
    if len(batches) < 2:
        return _encode(encoder, texts)
    parts = [cut(texts, rows) for rows in batches]
    vectors = [_encode(encoder, some) for some, _ in parts]
    return torch.cat(vectors)[inverse([rows for _, rows in parts])]


def _encode(encoder: nn.Module, texts: Texts) -> Tensor:
    return encoder(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])


def batches_of_similar_length(
    lengths: np.ndarray, padded_length: int, device: str
) -> list[np.ndarray]:
    """Rows of texts of similar length; all in one batch where that is as fast.

    Args:
        lengths: tokens of each text, `(n_texts,) int64`.
        padded_length: to which all texts are padded.
        device: the type of the device.
    """
    most = TOKENS_PER_BATCH.get(device)
    everything = [np.arange(len(lengths))]
    if most is None:
        return everything
    batches = plan_batches(lengths, most)
    total, size = int(lengths.sum()), len(lengths) * padded_length
    if device == "cpu":
        is_faster = size > math.ceil(1.05 * total) or total > 2 * most
    else:
        is_faster = sum(len(rows) * lengths[rows].max() for rows in batches) < LEAST_GAIN * size
    return batches if is_faster else everything


def can_train_packed(encoder: Encoder, device: torch.device) -> bool:
    """Whether a kernel for texts of several lengths computes this encoder's attention.

    It has no dropout, and half precision only.
    """
    kind, dtype = device.type, next(encoder.parameters()).dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    config = getattr(encoder.backbone, "config", None)
    has_dropout = any(getattr(config, name, 0.0) for name in ATTENTION_DROPOUTS)
    return has_varlen(device, dtype) and not has_dropout and can_pack(encoder)


def encode_end_to_end(encoder: Encoder, texts: Texts) -> Tensor:
    """The vectors of texts, `(n_texts, dim)`, computed without padding.

    Args:
        encoder: `can_train_packed` holds.
        texts: texts; a GPU does not wait if they have their lengths.
    """
    lengths, ids = with_lengths(texts)[LENGTHS], texts["input_ids"]
    order = np.argsort(-lengths, kind="stable")
    sizes, columns = lengths[order], np.arange(ids.shape[1])
    places = (order[:, None] * ids.shape[1] + columns)[columns < sizes[:, None]]
    packed = ids.flatten()[on_device(places, ids.device)]
    vectors = encode_packed(encoder, packed, PackedTexts.of(sizes.tolist(), packed.device))
    return vectors[inverse([on_device(order, ids.device)])]


def packing_defect(encoder: Encoder, texts: Texts) -> str:
    """What is wrong with packed texts: some are encoded both ways, and their gradients computed.

    Returns:
        Empty if vectors and gradients are the same.
    """
    texts = with_lengths(texts)
    by_length = np.argsort(texts[LENGTHS], kind="stable")
    chosen = np.unique(np.linspace(0, len(by_length) - 1, PROOF_TEXTS).astype(int))
    some, _ = cut(texts, by_length[chosen])
    was_training = encoder.training
    encoder.eval()  # dropout would differ
    try:
        expected = _vectors_and_gradient(_encode, encoder, some)
        found = _vectors_and_gradient(encode_end_to_end, encoder, some)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a backbone's own code refuses in its own way
        return one_line(error)
    finally:
        encoder.train(was_training)
        torch.clear_autocast_cache()  # see `cached_vectors`
    for name, ours, theirs in zip(("vectors", "gradients"), found, expected, strict=True):
        likeness = functional.cosine_similarity(ours, theirs, dim=-1).min()
        if bool(theirs.isfinite().all()) and not bool(likeness > LEAST_LIKENESS):
            return f"{name} differ, cosine similarity {likeness:.3g}"
    return ""


def _vectors_and_gradient(
    encode: Callable[[Encoder, Texts], Tensor], encoder: Encoder, texts: Texts
) -> tuple[Tensor, Tensor]:
    """Vectors `(n_texts, dim)`, and the gradient of some number made of them, `(n_weights,)`."""
    torch.clear_autocast_cache()
    with torch.enable_grad():
        vectors = encode(encoder, texts)
        weights = [weight for weight in encoder.parameters() if weight.requires_grad]
        if not weights:
            return vectors, vectors.new_ones(1)
        directions = torch.arange(vectors.numel(), device=vectors.device).sin().view_as(vectors)
        gradients = torch.autograd.grad((vectors * directions).sum(), weights, allow_unused=True)
    return vectors.detach(), torch.cat([g.flatten().float() for g in gradients if g is not None])
