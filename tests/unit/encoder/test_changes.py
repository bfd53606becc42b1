"""What may be changed about an encoder before it is trained."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer, append_eos
from mlflow_dr.errors import UsageError

Make = Callable[..., Encoder]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 6, 3, 0, 0]])
MASK = (IDS != 0).long()


def test_a_projection_is_added_after_the_pooling(make_tiny: Make) -> None:
    encoder = make_tiny(pooling="mean")
    made = with_projection(encoder, None, 48)
    assert made.dimension == 48
    expected = made.head[1].linear(encoder(IDS, MASK))
    torch.testing.assert_close(made(IDS, MASK), expected)
    assert with_projection(encoder, 128, 7).dimension == 7


def test_a_projection_that_does_not_fit_is_refused(make_tiny: Make) -> None:
    with pytest.raises(UsageError, match=r"takes 768 dimensions, but .* gives 128"):
        with_projection(make_tiny(), 768, 48)


def test_an_existing_projection_is_kept(make_tiny: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = with_projection(make_tiny(), None, 48)
    with caplog.at_level(logging.INFO):
        assert with_projection(made, None, 64) is made
    assert "already has a projection to 48 dimensions" in caplog.text


def test_untied_encoders_are_equal_at_first_and_share_nothing(
    make_tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = with_projection(make_tiny(), None, 48)
    with caplog.at_level(logging.INFO):
        untie(encoder)
    assert "one encoder was loaded" in caplog.text
    query_encoder = encoder.query_encoder
    assert query_encoder is not encoder
    assert torch.equal(query_encoder(IDS, MASK), encoder(IDS, MASK))
    assert not {p.data_ptr() for p in query_encoder.parameters()} & {
        p.data_ptr() for name, p in encoder.named_parameters() if "untied_query_encoder" not in name
    }


def test_untied_encoders_that_were_loaded_stay_as_they_are(
    make_tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make_tiny()
    encoder.untied_query_encoder = query_encoder = make_tiny(seed=1)
    with caplog.at_level(logging.INFO):
        untie(encoder)
    assert encoder.untied_query_encoder is query_encoder
    assert "the encoders of queries and passages were loaded" in caplog.text


VOCABULARY = {
    **{"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "a": 4, "b": 5, "ab": 6},
    **{"Ġ": 7, "Ġa": 8, "▁": 9, "▁a": 10, "c": 11, "d": 12, "e": 13},
}
MERGES = [("a", "b"), ("Ġ", "a"), ("▁", "a")]


def word_tokenizer(rule: Any = None, **special: str) -> PreTrainedTokenizerFast:
    """One token for each word."""
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if rule is not None:
        backend.post_processor = rule
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special
    )


BEGIN = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
)
AROUND = processors.TemplateProcessing(
    single="<s> $A c", pair="<s> $A c $B c", special_tokens=[("<s>", 2), ("c", 11)]
)
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "no rule": lambda: word_tokenizer(eos_token="</s>"),
    "a begin": lambda: word_tokenizer(BEGIN, eos_token="</s>", bos_token="<s>"),
    "a begin and an end": lambda: word_tokenizer(AROUND, eos_token="</s>"),
    "a separator": lambda: word_tokenizer(sep_token="</s>"),
    # bytes, and a rule of their own
    "qwen2": lambda: Qwen2Tokenizer(
        vocab=VOCABULARY, merges=MERGES, eos_token="</s>", pad_token="<pad>"
    ),
    "llama": lambda: LlamaTokenizer(
        vocab=VOCABULARY, merges=MERGES, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_text_ends_with_the_token(kind: str, tmp_path: Path) -> None:
    """Texts are cut or complete, alone or in a batch, saved and loaded by AutoTokenizer."""
    before, tokenizer = TOKENIZERS[kind](), TOKENIZERS[kind]()
    append_eos(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    append_eos(again)
    texts = ["a b", "a", "b a b a b a b a"]
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), again):
        assert made(texts)["input_ids"] == [[*ids, 3] for ids in before(texts)["input_ids"]]
        assert made("")["input_ids"] == [*before("")["input_ids"], 3]
        cut = made(texts, truncation=True, max_length=4)["input_ids"]
        expected = before(texts, truncation=True, max_length=3)["input_ids"]
        assert cut == [[*ids, 3] for ids in expected]
        assert max(map(len, cut)) == 4


def test_the_end_token_is_saved_with_the_encoder(make_tiny: Make, tmp_path: Path) -> None:
    encoder = make_tiny(pooling="last", passage_max_length=5)
    tokenizer = word_tokenizer(eos_token="</s>")
    append_eos(tokenizer)
    settings = encoder.settings
    save_encoder(tmp_path / "saved", Encoder(encoder.backbone, tokenizer, settings))
    loaded = load_encoder(tmp_path / "saved")
    rows = TextTokenizer.of(loaded).passage_ids(
        [Passage("1", "", "a b"), Passage("2", "", "a b c d e a b")]
    )
    assert rows == [[4, 5, 3], [4, 5, 11, 12, 3]]
    digest = TextTokenizer(word_tokenizer(eos_token="</s>"), settings).passage_digest()
    assert TextTokenizer(loaded.tokenizer, settings).passage_digest() != digest


def test_a_tokenizer_that_already_ends_with_the_token_stays(
    make_tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tiny().tokenizer
    before = tokenizer("the ship")["input_ids"]
    with caplog.at_level(logging.INFO):
        append_eos(tokenizer)
    assert tokenizer("the ship")["input_ids"] == before
    assert "already ends every text with [SEP]" in caplog.text


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--append_eos_token: .* no end-of-sequence token"):
        append_eos(word_tokenizer())

    class Slow:
        eos_token = "</s>"

    with pytest.raises(UsageError, match=r"--append_eos_token needs .* tokenizer\.json"):
        append_eos(Slow())


def test_tokenised_texts_also_end_with_the_token() -> None:
    tokenizer = word_tokenizer(BEGIN, eos_token="</s>")
    append_eos(tokenizer)
    config = EncoderConfig(passage_max_length=5)
    rows = TextTokenizer(tokenizer, config).passage_ids([Passage("1", "", "", [4, 5, 11, 12, 13])])
    assert rows == [[2, 4, 5, 11, 3]]


def test_both_encoders_get_the_projection(make_tiny: Make) -> None:
    encoder = make_tiny()
    encoder.untied_query_encoder = query_encoder = make_tiny(seed=1)
    made = with_projection(encoder, None, 48)
    assert made.untied_query_encoder is not None
    assert made.untied_query_encoder.backbone is query_encoder.backbone
    assert made.dimension == made.untied_query_encoder.dimension == 48
