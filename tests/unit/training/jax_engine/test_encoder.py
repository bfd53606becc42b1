"""Vectors of JAX's encoder, held against torch's."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn

from mlflow_dr.encoder.config import POOLINGS
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie
from mlflow_dr.errors import UsageError
from mlflow_dr.jax_engine.encoder import encode_functions, weights_of

Make = Callable[..., Any]
LENGTHS = [9, 1, 4, 12]


def difference(encoder: Encoder, texts: Any, role: int) -> float:
    """The largest difference to torch's vectors; 0 is the role of queries."""
    encode = jax.jit(lambda weights, *texts: encode_functions(encoder)[role](weights, *texts, None))
    ids, mask = (texts[name].numpy().astype(np.int32) for name in ("input_ids", "attention_mask"))
    ours = np.asarray(encode(weights_of(encoder), ids, mask))
    with torch.no_grad():
        theirs = (encoder if role else encoder.query_encoder)(**texts).numpy()
    assert ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "xlm-roberta"])
def test_each_kind_of_backbone_gives_torchs_vectors(
    in_fp64: None, make_backbone: Make, make_texts: Make, kind: str
) -> None:
    encoder = make_backbone(kind).double()
    assert difference(encoder, make_texts(LENGTHS), 1) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_poolings_projection_and_normalisation_give_torchs_vectors(
    in_fp64: None, make_backbone: Make, make_texts: Make, dtype: torch.dtype, limit: float
) -> None:
    """All six poolings side by side, then a projection with an activation."""
    encoder = make_backbone("bert", pooling="+".join(POOLINGS), normalize=True)
    pooling, normalize = encoder.head
    torch.manual_seed(0)
    head = [pooling, Dense(6 * 16, 8, activation_function=nn.Tanh()), normalize]
    encoder = Encoder(encoder.backbone, encoder.tokenizer, encoder.settings, head=head).to(dtype)
    assert difference(encoder, make_texts(LENGTHS), 1) < limit


def test_queries_have_their_own_weights(
    in_fp64: None, make_backbone: Make, make_texts: Make
) -> None:
    encoder = make_backbone("bert").double()
    untie(encoder)
    with torch.no_grad():
        for weight in encoder.query_encoder.parameters():
            weight.mul_(1.5)
    assert difference(encoder, make_texts(LENGTHS), 0) < 1e-12
    assert difference(encoder, make_texts(LENGTHS), 1) < 1e-12


def test_dropout_depends_on_the_key_alone(make_backbone: Make, make_texts: Make) -> None:
    encoder = make_backbone("bert")
    encoder.backbone.config.hidden_dropout_prob = 0.5
    texts = make_texts(LENGTHS)
    ids, mask = (texts[name].numpy() for name in ("input_ids", "attention_mask"))
    encode = jax.jit(encode_functions(encoder)[1])
    first, again, other = (
        np.asarray(encode(weights_of(encoder), ids, mask, jax.random.key(seed, impl="rbg")))
        for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert not np.isclose(first, other).any(axis=0).all()


def adapted(encoder: Encoder) -> Encoder:
    add_lora(encoder, "base", rank=2, alpha=4, dropout=0.0)
    return encoder


def with_mish(encoder: Encoder) -> Encoder:
    head = [*encoder.head, Dense(16, 8, activation_function=nn.Mish())]
    return Encoder(encoder.backbone, encoder.tokenizer, encoder.settings, head=head)


def acting(encoder: Encoder) -> Encoder:
    encoder.backbone.config.hidden_act = "mish"
    return encoder


def renamed(encoder: Encoder) -> Encoder:
    encoder.backbone.config.model_type = "mpnet"
    return encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "model_type is mpnet; --engine jax has backbones of bert, roberta, xlm-roberta"),
        (adapted, "does not train adapters"),
        (with_mish, "known: Identity, Tanh, ReLU, SiLU, Sigmoid"),
        (acting, "activation mish"),
    ],
)
def test_what_is_not_written_in_jax_is_refused(
    make_backbone: Make, change: Make, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        encode_functions(change(make_backbone("bert")))
