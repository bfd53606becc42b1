"""`--model tiny`: a two-layer BERT from scratch, with a vocabulary learnt from the training text.

Small enough to learn to retrieve in a minute or two on a laptop's processor, with no download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder

LAYERS, WIDTH, HEADS, INNER = 2, 128, 2, 512
VOCABULARY_SIZE = 8192
ALPHABET_SIZE = 1000
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 512


def tiny_encoder(texts: Iterable[str], config: EncoderConfig) -> Encoder:
    """A fresh encoder; its weights come from torch's random state, so seed that first.

    Args:
        texts: what the WordPiece vocabulary is learnt from.
        config: pooling, lengths and the rest.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    rules = BertWordPieceTokenizer(_vocabulary(list(texts)), lowercase=True)
    tokenizer = BertTokenizer(tokenizer_object=rules._tokenizer, model_max_length=POSITIONS)
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


def _vocabulary(texts: list[str]) -> dict[str, int]:
    """WordPiece's vocabulary, equal for equal texts: in every run, and on every rank of one.

    Left to itself the learner numbers the pieces of one character in the order of a hash map that
    differs from process to process, and ties between pieces go by those numbers. So they come
    first, in an order of our own.
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
