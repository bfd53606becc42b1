"""The encoder as a module."""

from collections.abc import Callable

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder, positions
from mlflow_dr.errors import UsageError

Make = Callable[..., Encoder]

IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 6, 3, 0, 0]])
MASK = (IDS != 0).long()
LAYERS = (Dense(128, 48, activation_function=nn.ReLU()), Dense(48, 16, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projections", [(), LAYERS], ids=["bare", "projected"])
def test_vectors_are_fp32_of_length_1_for_all_weights(
    make_tiny: Make, dtype: torch.dtype, projections: tuple[Dense, ...]
) -> None:
    encoder = make_tiny(pooling="cls", normalize=True, projections=projections).to(dtype)
    vectors = encoder(IDS, MASK)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (2, encoder.dimension) == (2, 16 if projections else 128)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


def test_vectors_keep_their_length_unless_they_are_normalised(make_tiny: Make) -> None:
    raw, normal = (make_tiny(normalize=value)(IDS, MASK) for value in (False, True))
    assert (raw.norm(dim=1) > 2).all()
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), normal)


def test_gradients_reach_the_backbone_through_the_projections(make_tiny: Make) -> None:
    encoder = make_tiny(projections=LAYERS)
    encoder(IDS, MASK).sum().backward()
    embeddings = encoder.backbone.embeddings.word_embeddings.weight.grad
    assert embeddings[9].abs().sum() > 0
    assert all(layer.linear.weight.grad is not None for layer in encoder.head if layer.state_dict())


def test_layers_whose_sizes_do_not_match_are_refused(make_tiny: Make) -> None:
    tiny = make_tiny()
    layers = (Dense(128, 48), Dense(32, 16))
    with pytest.raises(UsageError, match="takes 32 dimensions, but the layer before it gives 48"):
        Encoder(tiny.backbone, tiny.tokenizer, EncoderConfig(), head=[Pooling(128, "cls"), *layers])


def test_texts_longer_than_the_backbone_has_positions_are_refused(
    make_tiny: Make,
) -> None:
    make_tiny(passage_max_length=512)
    with pytest.raises(UsageError, match=r"passage_max_length is 513, but .* 512 positions"):
        make_tiny(passage_max_length=513)


def test_roberta_counts_positions_from_the_padding() -> None:
    small = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    config = RobertaConfig(
        max_position_embeddings=514, pad_token_id=1, num_hidden_layers=1, **small
    )
    assert positions(RobertaModel(config)) == 512
    bert = BertConfig(max_position_embeddings=40, pad_token_id=1, num_hidden_layers=1, **small)
    assert positions(BertModel(bert)) == 40
    t5 = T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=9)
    assert positions(T5EncoderModel(t5)) is None
