"""The encoder from scratch."""

import torch

from mlflow_dr.encoder.backbone import tiny_encoder
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.tokenize import TextTokenizer


def test_the_vocabulary_is_the_same_in_every_process(texts: list[str]) -> None:
    vocabularies = [
        tiny_encoder(iter(texts), EncoderConfig()).tokenizer.get_vocab() for _ in range(3)
    ]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_frequent_words_are_one_token_and_others_are_pieces(texts: list[str]) -> None:
    tokenizer = tiny_encoder(texts, EncoderConfig()).tokenizer
    assert tokenizer.tokenize("The THE thé") == ["the", "the", "the"]
    assert tokenizer.tokenize("theta") == ["the", "##t", "##a"]
    assert tokenizer.tokenize("##a") == ["[UNK]", "[UNK]", "a"]


def test_the_special_tokens_equal_berts(texts: list[str]) -> None:
    tokenizer = tiny_encoder(texts, EncoderConfig()).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("the ship").input_ids) == [
        "[CLS]",
        "the",
        *tokenizer.tokenize("ship"),
        "[SEP]",
    ]
    assert sorted(tokenizer.all_special_tokens) == ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UNK]"]
    assert tokenizer.pad_token_id == 0


def test_the_weights_come_from_torchs_random_state(texts: list[str]) -> None:
    encoders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        encoders.append(tiny_encoder(texts, EncoderConfig()))
    first, same, other = (
        encoder.backbone.embeddings.word_embeddings.weight for encoder in encoders
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    settings = encoders[0].settings
    digests = {TextTokenizer(encoder.tokenizer, settings).passage_digest() for encoder in encoders}
    assert len(digests) == 1
