"""Encoders with random weights, and CUDA's attention by its definition."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.stores.token_table import TokenTable

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 100,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}  # fewer heads of keys than of queries
DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PACKED: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    "DistilBert": DISTIL,
    "ModernBert": {
        **SIZES,
        **SPECIAL,
        "num_hidden_layers": 3,
        "local_attention": 16,
        "global_attn_every_n_layers": 3,
    },
    "Electra": {**SIZES, "embedding_size": 16},
    "Llama": {**SIZES, **GROUPED},
    "Qwen3": {**SIZES, **GROUPED},
    "Mistral": {**SIZES, **GROUPED, "sliding_window": 12},
}


def encoder_of(kind: str, settings: dict[str, Any], pooling: str = "mean") -> Encoder:
    """A small encoder with random weights, large enough that attention matters."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}EncoderModel" if kind == "T5" else f"{kind}Model")
    backbone = model(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    config = EncoderConfig(
        pooling=pooling, normalize=True, query_max_length=64, passage_max_length=64
    )
    return Encoder(backbone, SimpleNamespace(pad_token_id=0), config).eval()


def texts_of(lengths: np.ndarray) -> PackedTexts:
    return PackedTexts.of(lengths.tolist(), torch.device("cpu"))


@torch.inference_mode()
def one_by_one(encoder: Encoder, table: TokenTable) -> torch.Tensor:
    """The vectors of texts, each encoded alone, without padding."""
    texts = [torch.from_numpy(table[row].astype(np.int64))[None] for row in range(len(table))]
    return torch.cat([encoder(ids, torch.ones_like(ids)) for ids in texts])


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` is documented to compute, text by text."""
    parts = []
    sizes = query_ends.diff().tolist(), key_ends.diff().tolist()
    assert max(sizes[0]) <= max_q
    assert max(sizes[1]) <= max_k
    assert query_ends.dtype == key_ends.dtype == torch.int32
    for queries, keys, values in zip(
        query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True
    ):
        if not len(keys):
            parts.append(torch.zeros_like(queries))
            continue
        # the last query is at the place of the last key
        places = torch.arange(len(queries)) + len(keys) - len(queries)
        offsets = torch.arange(len(keys)) - places[:, None]
        left, right = window_size
        mask = (offsets >= -left) | (left < 0)
        mask &= (offsets <= right) | (right < 0)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (queries, keys, values)),
            attn_mask=mask,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)
