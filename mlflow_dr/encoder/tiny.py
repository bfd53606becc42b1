"""`--model tiny`: a new two-layer BERT, with a vocabulary learnt from the training text.

It learns to retrieve in a minute or two on a laptop's processor, and needs no download.
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
    """A new encoder; its weights depend on torch's random state, so set torch's seed before.

    Args:
        texts: the WordPiece vocabulary is learnt from them.
        config: the encoder's settings.
    """
    from transformers import BertConfig, BertModel, BertTokenizer

    tokenizer = BertTokenizer(_vocabulary(list(texts)), model_max_length=POSITIONS)
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
