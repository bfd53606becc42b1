"""Text to token ids: prompts, titles, lengths, and the digest that names them."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import PreTokenizer, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertJapaneseTokenizer, BertTokenizer, PreTrainedTokenizerFast

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder import tokenize
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.tokenize import PROBES, TextTokenizer, highest_id
from mlflow_dr.errors import DataError

WORDS = ["[PAD]", "[UNK]", "red", "blue", "Red", "query", "passage", "|", "title", "long"]


def tokenizer(vocabulary: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """Words to their numbers, with no special tokens: an empty text has no token at all."""
    vocabulary = vocabulary or {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )


def text_tokenizer(**settings: Any) -> TextTokenizer:
    return TextTokenizer(tokenizer(), EncoderConfig(**settings))


def tokens_of(rows: list[list[int]]) -> list[str]:
    return [" ".join(WORDS[number] for number in row) for row in rows]


def test_prompts_are_put_before_queries_and_passages() -> None:
    made = text_tokenizer(query_prompt="query ", passage_prompt="passage ")
    assert tokens_of(made.query_ids([Query("1", " red "), Query("2", "blue")])) == [
        "query red",
        "query blue",
    ]
    passages = [Passage("1", "", "red"), Passage("2", "title", "blue")]
    assert tokens_of(made.passage_ids(passages)) == ["passage red", "passage title blue"]


def test_the_separator_is_put_between_title_and_text() -> None:
    made = text_tokenizer(title_separator=" | ", passage_prompt="passage: ")
    passages = [Passage("1", "title", "red"), Passage("2", "", "red"), Passage("3", "title", "")]
    assert made.passage_texts(passages) == [
        "passage: title | red",
        "passage: red",
        "passage: title |",
    ]


def test_each_kind_of_text_has_its_own_length() -> None:
    made = text_tokenizer(query_max_length=3, passage_max_length=5, query_prompt="query ")
    long = "long " * 20
    assert tokens_of(made.query_ids([Query("1", long)])) == ["query long long"]
    assert tokens_of(made.passage_ids([Passage("1", "title", long)])) == ["title" + " long" * 4]


def test_special_tokens_count_towards_the_length(make_tiny: Callable[..., Any]) -> None:
    encoder = make_tiny(passage_max_length=6)
    (ids,) = TextTokenizer.of(encoder).passage_ids([Passage("1", "", "ship " * 20)])
    assert len(ids) == 6
    assert (ids[0], ids[-1]) == (encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id)


def test_lowercase() -> None:
    assert tokens_of(text_tokenizer().query_ids([Query("1", "Red")])) == ["Red"]
    assert tokens_of(text_tokenizer(lowercase=True).query_ids([Query("1", "Red")])) == ["red"]


def test_an_empty_text_is_one_token_of_padding() -> None:
    made = text_tokenizer()
    assert made.passage_ids([Passage("1", "", " "), Passage("2", "", "red")]) == [[0], [2]]
    assert made.query_ids([Query("1", "")]) == [[0]]
    assert made.passage_ids([]) == []


def test_unused_ids_of_a_vocabulary_are_counted() -> None:
    gapped = tokenizer({"[PAD]": 0, "[UNK]": 1, "red": 70_000})
    assert highest_id(gapped) == 70_000
    assert TextTokenizer(gapped, EncoderConfig()).vocabulary_size == 70_001


@pytest.mark.parametrize(
    "change",
    [
        {"passage_prompt": "passage "},
        {"passage_max_length": 64},
        {"title_separator": " | "},
        {"lowercase": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_the_settings_of_passages(change: dict[str, Any]) -> None:
    assert text_tokenizer(**change).passage_digest() != text_tokenizer().passage_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"query_prompt": "query "},
        {"query_max_length": 8},
        {"pooling": "mean"},
        {"normalize": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_does_not_change_with_other_settings(change: dict[str, Any]) -> None:
    assert text_tokenizer(**change).passage_digest() == text_tokenizer().passage_digest()


def test_the_digest_depends_on_the_tokenizer() -> None:
    def digest(made: PreTrainedTokenizerFast) -> str:
        return TextTokenizer(made, EncoderConfig()).passage_digest()

    swapped = {word: number for number, word in enumerate(reversed(WORDS))}
    assert digest(tokenizer()) == digest(tokenizer())
    assert digest(tokenizer(swapped)) != digest(tokenizer())
    grown = tokenizer()
    grown.add_tokens(["green"])
    assert digest(grown) != digest(tokenizer())
    left = tokenizer()
    left.truncation_side = "left"
    assert digest(left) != digest(tokenizer())


PYTHON_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "Red", "blue", "##s"]


class PythonTokenizer(BertJapaneseTokenizer):
    """Has no backend; `hidden` is a rule that it says nowhere."""

    hidden = False

    def _tokenize(self, text: str) -> list[str]:
        return super()._tokenize(text.replace("don't", "red") if self.hidden else text)


@pytest.fixture
def python_digest(tmp_path: Path) -> Callable[..., str]:
    """The digest of a tokenizer without a backend, whose files are removed afterwards."""

    def digest(
        change: Callable[[Any], object] = lambda made: None,
        vocabulary: Sequence[str] = PYTHON_WORDS,
        name: str = "name",
        **settings: Any,
    ) -> str:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "vocab.txt"
        path.write_text("\n".join(vocabulary))
        made = PythonTokenizer(str(path), name_or_path=str(path.parent), **settings)
        shutil.rmtree(tmp_path / name)
        assert not hasattr(made, "backend_tokenizer")
        change(made)
        return TextTokenizer(made, EncoderConfig()).passage_digest()

    return digest


@pytest.mark.parametrize(
    "change",
    [
        {"do_lower_case": True},
        {"do_word_tokenize": False},
        {"subword_tokenizer_type": "character"},
        {"never_split": ["reds"]},
        {"split_special_tokens": True},
        {"cls_token": "[MASK]"},
        {"vocabulary": [*PYTHON_WORDS, "new"]},
        {"change": lambda made: made.add_tokens(["green"])},
        {"change": lambda made: setattr(made, "truncation_side", "left")},
        {"change": lambda made: setattr(made, "pad_token", "[MASK]")},
        {"change": lambda made: setattr(made, "hidden", True)},
        {"change": lambda made: setattr(made, "special_tokens_pattern", "cls")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_has_the_settings_of_a_tokenizer_in_python(
    python_digest: Callable[..., str], change: dict[str, Any]
) -> None:
    assert python_digest(**change) != python_digest()


def test_the_digest_of_a_tokenizer_in_python_has_nothing_else(
    python_digest: Callable[..., str],
) -> None:
    """Every checkpoint of a run is read from a folder of its own."""
    others = {"chat_template": "{{ x }}", "model_max_length": 77, "local_files_only": True}
    assert python_digest(name="other", **others) == python_digest()


def test_the_digest_has_rules_outside_the_backend() -> None:
    split = tokenizer()
    split.split_special_tokens = True
    pad = tokenizer()
    pad.pad_token = "red"
    digests = {
        TextTokenizer(made, EncoderConfig()).passage_digest() for made in (tokenizer(), split, pad)
    }
    assert len(digests) == 3


class Reversed:
    """A rule in Python, which no backend can write down."""

    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: [*reversed(part.split(" ", "removed"))])


def test_a_backend_with_a_rule_in_python_has_a_digest() -> None:
    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Reversed())
    digest = TextTokenizer(made, EncoderConfig()).passage_digest()
    assert digest != TextTokenizer(tokenizer(), EncoderConfig()).passage_digest()


def test_the_digest_does_not_depend_on_earlier_texts() -> None:
    made = text_tokenizer()
    before = made.passage_digest()
    made.query_ids([Query("1", "red " * 50)])
    made.passage_ids([Passage("1", "", "red " * 500)])
    assert made.passage_digest() == before


def test_tokenised_texts_get_prompt_and_special_tokens(
    make_tiny: Callable[..., Any],
) -> None:
    """The tokens equal those of the text itself; the length counts all of them."""
    encoder = make_tiny(query_prompt="ship: ", passage_prompt="the ", passage_max_length=8)
    made = TextTokenizer.of(encoder)
    text = "the tide tables are printed a year ahead"
    bare = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert made.query_ids([Query("1", "", (), bare)]) == made.query_ids([Query("1", text)])
    assert made.passage_ids([Passage("1", "", "", bare)]) == made.passage_ids(
        [Passage("1", "", text)]
    )
    (ids,) = made.passage_ids([Passage("1", "", "", bare)])
    assert len(ids) == 8
    assert ids[-1] == encoder.tokenizer.sep_token_id
    empty = made.passage_ids([Passage("1", "", "", ()), Passage("2", "", "", bare[:2])])
    assert empty[0] == made.passage_ids([Passage("1", "", "")])[0]


def test_a_prompt_longer_than_the_length_is_cut_like_a_text(
    make_tiny: Callable[..., Any],
) -> None:
    encoder = make_tiny(passage_prompt="the ship, the ship, the ship: ", passage_max_length=5)
    made = TextTokenizer.of(encoder)
    bare = encoder.tokenizer("the tide tables", add_special_tokens=False)["input_ids"]
    assert made.passage_ids([Passage("1", "", "", bare)]) == made.passage_ids(
        [Passage("1", "", "the tide tables")]
    )


def test_ids_beyond_the_vocabulary_are_an_error() -> None:
    made = text_tokenizer()
    assert made.passage_ids([Passage("1", "", "", [9])]) == [[9]]
    for ids in (
        lambda: made.passage_ids([Passage("1", "", "", [2, 10])]),
        lambda: made.query_ids([Query("1", "", (), [2, 10])]),
    ):
        with pytest.raises(DataError, match=r"token id 10, .* ids end at 9"):
            ids()


def test_a_tokenizer_that_rewrites_texts_refuses_tokenised_ones() -> None:
    made = tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(single="$A:0 $A:0", special_tokens=[])
    assert TextTokenizer(made, EncoderConfig()).passage_ids([Passage("1", "", "red")]) == [[2, 2]]


def bert_tokenizer() -> BertTokenizer:
    pieces = ["ship", "##s", "iron", "sea", ",", ".", "a", "b", "##b", "naive", "[", "]", "mask"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return BertTokenizer({name: number for number, name in enumerate(names)}, model_max_length=512)


@pytest.mark.parametrize("length", [4, 9, 64])
@pytest.mark.parametrize("side", ["right", "left"])
def test_words_that_are_tokenised_once_give_the_ids_of_whole_texts(
    length: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of = bert_tokenizer()
    made_of.truncation_side = side
    made = TextTokenizer(made_of, EncoderConfig(passage_max_length=length))
    odd = [
        "ships, iron",
        " sea  sea ",
        "",
        "a[MASK]b [SEP] sea\nships\tnaïve",
        "xyz ab. abb",
        "[ a ]",
    ]
    passages = [Passage(str(n), "", text) for n, text in enumerate([*PROBES, *odd] * 3)]
    whole = made.passage_ids(passages)
    monkeypatch.setattr(tokenize, "TEXTS_WORTH_WORDS", 10)
    for most in (1 << 19, 3):  # the second time all words are forgotten on the way
        monkeypatch.setattr(tokenize, "MOST_WORDS", most)
        assert made.passage_ids(passages[:30]) == whole[:30]
        assert made.passage_ids(passages) == whole
        assert made._words_proven and made._word_ids


def test_texts_whose_words_depend_on_each_other_are_tokenised_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize, "TEXTS_WORTH_WORDS", 2)
    made_of = bert_tokenizer()
    made_of.backend_tokenizer.normalizer = Replace("iron sea", "ship")
    made = TextTokenizer(made_of, EncoderConfig(passage_max_length=16))
    assert made.passage_ids([Passage("1", "", "iron sea")] * 2) == [[2, 5, 3]] * 2
    assert made._words_proven is False
    other = text_tokenizer()
    assert tokens_of(other.passage_ids([Passage("1", "", "red blue")] * 2)) == ["red blue"] * 2
    assert other._words_proven is False
