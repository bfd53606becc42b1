"""`--model tiny`: a two-layer BERT from scratch, with a vocabulary learnt from the training text.

Small enough to learn to retrieve in a minute or two on a laptop's processor, with no download.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder

LAYERS, WIDTH, HEADS, INNER = 2, 128, 2, 512
VOCABULARY_SIZE = 8192
POSITIONS = 512


def tiny_encoder(texts: Iterable[str], config: EncoderConfig) -> Encoder:
    """A fresh encoder; its weights come from torch's random state, so seed that first.

    Args:
        texts: what the WordPiece vocabulary is learnt from.
        config: pooling, lengths and the rest.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=VOCABULARY_SIZE, show_progress=False)
    tokenizer = BertTokenizer(tokenizer_object=learner._tokenizer, model_max_length=POSITIONS)
    backbone = BertModel(
        BertConfig(
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
