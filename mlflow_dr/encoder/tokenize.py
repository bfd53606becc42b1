"""Text to token ids: prompts, titles and lengths, and a digest of all that ids depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.errors import CheckpointError, DataError, UsageError, one_line
from mlflow_dr.hub import hub_is_away

if TYPE_CHECKING:
    from mlflow_dr.encoder.model import Encoder

log = logging.getLogger(__name__)

SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE = ".jinja"
NO_RULES = {"is_local", "local_files_only", "model_max_length", "processor_class"}

TEXTS_WORTH_WORDS = 1024  # fewer have few words in common
TEXTS_TO_PROVE = 64
MOST_WORDS = 1 << 19  # about 100 MB
TEXTS_SPLIT = 256  # at a time, so that their words stay in the processor's cache

# short texts, because the length may be short
PROBES = (
    *("", "The THE the", "don't U.S.A.'s", "naïve Straße", "a_b#c <tag> [x] {y}", "$1,234.50 20%"),
    *("  two  spaces", "tab\tline\nline\r", "soft\u00adhyphen\u200b\u00a0\ufeff", "e\u0301 ÀÉ"),
    *("ΣΑΣ İ ŉ", "Привет МИР", "東京都に行く", "北京大学生", "한국어", "ภาษาไทย"),
    *("العَرَبِيَّة", "हिन्दी", "👩\u200d👧 ☃", "ﬁ ½ Ⅳ ｶﾞ"),
    *("[CLS] [SEP] [MASK] [UNK]", "<s> </s> <pad> <unk>"),
)


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer.

    Args:
        name: the tokenizer's directory or hub name.

    Raises:
        UsageError: no tokenizer has this name.
    """
    from transformers import AutoTokenizer

    options = {} if Path(name).is_dir() else {"local_files_only": hub_is_away()}
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name!r}: no tokenizer in a directory of this name, on the hub or in its cache"
        ) from error


def plain_tokens(name: str) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from texts to token ids without special tokens.

    Args:
        name: the tokenizer's directory or hub name.

    Raises:
        UsageError: no tokenizer has this name.
    """
    tokenizer = load_tokenizer(name)
    return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]


class TextTokenizer:
    """Makes token ids of an encoder's queries and passages.

    Args:
        tokenizer: a Hugging Face tokenizer.
        config: prompts, lengths and the title separator.
    """

    def __init__(self, tokenizer: Any, config: EncoderConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.pad_id: int = tokenizer.pad_token_id or 0
        self.vocabulary_size = highest_id(tokenizer) + 1
        self._word_ids: dict[str, list[int]] = {}
        self._words_proven: bool | None = None

    @classmethod
    def of(cls, encoder: Encoder) -> TextTokenizer:
        """The tokenizer of an encoder; of its queries, if `encoder.query_encoder` is given."""
        return cls(encoder.tokenizer, encoder.settings)

    def query_ids(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of queries, with prompt and special tokens.

        Some queries may be text and others tokens, because several sets of queries are joined.
        """
        prompt, length = self._config.query_prompt, self._config.query_max_length
        texts = [prompt + self._query_text(query) for query in queries if query.tokens is None]
        tokens = [query.tokens for query in queries if query.tokens is not None]
        text_ids = iter(self._ids(texts, length))
        token_ids = iter(self._framed(tokens, prompt, length))
        return [next(text_ids if query.tokens is None else token_ids) for query in queries]

    def _query_text(self, query: Query) -> str:
        """A query's text without its prompt; as in DPR, a `?` before a final space stays."""
        stripped = self._config.strip_question_mark
        return (query.text.removesuffix("?") if stripped else query.text).strip()

    def passage_texts(self, passages: Sequence[Passage]) -> list[str]:
        """Each passage as one text: prompt, title, separator, text."""
        separator = self._config.title_separator
        return [
            self._config.passage_prompt
            + (f"{p.title}{separator}{p.text}" if p.title else p.text).strip()
            for p in passages
        ]

    def passage_ids(self, passages: Sequence[Passage]) -> list[list[int]]:
        """Token ids of passages, with prompt and special tokens."""
        config = self._config
        if any(passage.tokens is not None for passage in passages):
            tokens = [passage.tokens or () for passage in passages]
            return self._framed(tokens, config.passage_prompt, config.passage_max_length)
        if config.title_as_pair:
            return self._pair_ids(passages)
        return self._ids(self.passage_texts(passages), config.passage_max_length)

    def _pair_ids(self, passages: Sequence[Passage]) -> list[list[int]]:
        """Token ids of titles and texts, the longer of the two cut until both fit, as DPR does."""
        config, separator = self._config, self._tokenizer.sep_token_id
        titles = [f"{config.passage_prompt}{passage.title}" for passage in passages]
        texts = [passage.text.strip() for passage in passages]
        if config.lowercase:
            titles, texts = ([text.lower() for text in part] for part in (titles, texts))
        before, after = self._frame
        room = max(0, config.passage_max_length - len(before) - len(after) - 1)
        ids: list[list[int]] = []
        for passage, title_ids, text_ids in zip(
            passages, self._all_bare(titles), self._all_bare(texts), strict=True
        ):
            if not passage.title:
                ids.append([*before, *(title_ids + text_ids)[: room + 1], *after])
                continue
            if len(title_ids) + len(text_ids) > room:
                # tokens are dropped one by one from the longer part, or from the text
                kept = max(room - len(text_ids), min(len(title_ids), room - room // 2))
                title_ids, text_ids = title_ids[:kept], text_ids[: room - kept]
            ids.append([*before, *title_ids, separator, *text_ids, *after])
        return ids

    def _all_bare(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "verbose": False}
        return list(self._tokenizer(list(texts), **options)["input_ids"]) if texts else []

    def query_digest(self) -> str:
        """A digest of the tokenizer and all settings that `query_ids` depends on."""
        config = self._config
        return self._digest(
            config.query_max_length,
            config.query_prompt,
            config.lowercase,
            config.strip_question_mark,
        )

    def passage_digest(self) -> str:
        """A digest of the tokenizer and all settings that `passage_ids` depends on."""
        config = self._config
        return self._digest(
            config.passage_max_length,
            config.passage_prompt,
            config.title_separator,
            config.lowercase,
            *(["pair"] if config.title_as_pair else []),
        )

    def _digest(self, max_length: int, *settings: object) -> str:
        side = getattr(self._tokenizer, "truncation_side", "right")
        probed = [self._probed(text, max_length) for text in PROBES]
        state = json.dumps([self._rules, self.pad_id, side, max_length, settings, probed])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    @cached_property
    def _rules(self) -> str:
        return _fingerprint(self._tokenizer)

    def _probed(self, text: str, max_length: int) -> list[int] | None:
        """Token ids of a probe, which show rules that are in no setting and no file."""
        try:
            return self._ids([text], max_length)[0]
        except Exception:  # noqa: BLE001 - without an unknown token some texts are refused
            return None

    def _framed(
        self, rows: Sequence[Sequence[int]], prompt: str, max_length: int
    ) -> list[list[int]]:
        """Token ids with prompt and special tokens, cut at the length.

        Args:
            rows: token ids without special tokens.
            prompt: put before each text.
            max_length: the most tokens of a text.

        Raises:
            DataError: the tokenizer does not have one of the ids.
        """
        if not rows:
            return []
        highest = max((max(row) for row in rows if len(row)), default=0)
        if highest >= self.vocabulary_size:
            raise DataError(
                f"a tokenised text has token id {highest}, but this tokenizer's ids end at "
                f"{self.vocabulary_size - 1}; it was tokenised for another vocabulary"
            )
        before, after = self._frame
        prompt_ids = self._bare(prompt) if prompt else []
        longest = max_length - len(before) - len(after)
        framed = []
        for row in rows:
            ids = [*prompt_ids, *row]
            ids = ids[max(len(ids) - longest, 0) :] if self._cuts_left else ids[:longest]
            framed.append([*before, *ids, *after] or [self.pad_id])
        return framed

    @property
    def _cuts_left(self) -> bool:
        """Whether a text that is too long is cut at its beginning."""
        return bool(getattr(self._tokenizer, "truncation_side", "right") == "left")

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        bare = self._bare("a")
        ids: list[int] = self._tokenizer("a")["input_ids"]
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[:start], ids[start + len(bare) :]
        raise DataError(
            "this tokenizer changes a text when it adds special tokens, so it cannot be used with "
            "texts that are already tokenised"
        )

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _lowered(self, text: str) -> str:
        """A text in lower case; the separator stays, because it may be a special token."""
        separator = self._config.title_separator
        parts = text.split(separator) if separator.strip() else [text]
        return separator.join(part.lower() for part in parts)

    def _ids(self, texts: list[str], max_length: int) -> list[list[int]]:
        if not texts:
            return []
        if self._config.lowercase:
            texts = [self._lowered(text) for text in texts]
        if self._can_cache_words(texts):
            return self._framed(self._ids_by_word(texts), "", max_length)
        return self._ids_of_whole(texts, max_length)

    def _can_cache_words(self, texts: list[str]) -> bool:
        """Whether there are many texts, and the first of them prove that words are independent."""
        if self._words_proven is None and len(texts) >= TEXTS_WORTH_WORDS:
            self._words_proven = self._splits_at_blanks and self._are_equal_by_word(texts)
        return bool(self._words_proven) and len(texts) >= TEXTS_WORTH_WORDS

    @property
    def _splits_at_blanks(self) -> bool:
        rules = _backend_rules(self._tokenizer) or {}
        return (rules.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"

    def _are_equal_by_word(self, texts: list[str]) -> bool:
        sample = [*PROBES, *texts[:: max(1, len(texts) // TEXTS_TO_PROVE)]]
        return self._ids_by_word(sample) == self._all_bare(sample)

    def _ids_by_word(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens; each distinct word is tokenised once."""
        if len(self._word_ids) > MOST_WORDS:
            self._word_ids.clear()
        known = self._word_ids
        self._bare("a")  # leaves the backend without truncation and padding
        tokenize = self._tokenizer.backend_tokenizer.encode_batch_fast
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_SPLIT):
            split = [text.split(" ") for text in texts[start : start + TEXTS_SPLIT]]
            new = list({word for words in split for word in words if word not in known})
            encodings = tokenize(new, add_special_tokens=False)
            known.update((word, coded.ids) for word, coded in zip(new, encodings, strict=True))
            ids += [list(chain.from_iterable(map(known.__getitem__, words))) for words in split]
        return ids

    def _ids_of_whole(self, texts: list[str], max_length: int) -> list[list[int]]:
        try:
            encoded = self._tokenizer(
                texts,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        except Exception as error:  # the Rust library's errors have no class of their own
            name = getattr(self._tokenizer, "name_or_path", "")
            raise CheckpointError(
                f"{name}: the tokenizer cannot make token ids of a text ({one_line(error)}); check "
                "that its files are not damaged"
            ) from error
        return [ids or [self.pad_id] for ids in encoded["input_ids"]]


def highest_id(tokenizer: Any) -> int:
    """The largest token id; `len(tokenizer) - 1` is another number if some ids are unused."""
    return max(tokenizer.get_vocab().values())


def _fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer's rules and vocabulary, without its truncation and padding."""
    rules = [
        type(tokenizer).__name__,
        getattr(tokenizer, "split_special_tokens", False),
        _backend_rules(tokenizer) or _python_rules(tokenizer),
    ]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _backend_rules(tokenizer: Any) -> Any:
    """The rules of the library `tokenizers`; None if some of them are Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    try:
        rules = json.loads(backend.to_str())
    except Exception:  # noqa: BLE001 - `tokenizers` raises it for a part in Python
        return None
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return rules


def _python_rules(tokenizer: Any) -> Any:
    """The vocabulary and all files that the tokenizer saves, by name.

    Settings that change no token id are left out.
    """
    saved: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        # some tokenizers cannot save their vocabulary, but save their settings first
        with suppress(Exception):
            tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            if path.is_dir() or path.suffix == CHAT_TEMPLATE:
                continue
            content = path.read_bytes()
            saved[path.name] = hashlib.sha256(content).hexdigest()
            if path.name == SETTINGS_FILE:
                settings = json.loads(content)
                saved[path.name] = {k: v for k, v in settings.items() if k not in NO_RULES}
    return [saved, sorted(tokenizer.get_vocab().items())]


def append_eos(tokenizer: Any) -> None:
    """Make a tokenizer end every text with its end-of-sequence token, also after truncation.

    The rule becomes part of the tokenizer and is saved with it.

    Raises:
        UsageError: the tokenizer has no such token, or no tokenizer.json.
    """
    token = tokenizer.eos_token or tokenizer.sep_token
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if token is None:
        raise UsageError("--append_eos_token: the tokenizer has no end-of-sequence token")
    if backend is None:
        raise UsageError("--append_eos_token needs a tokenizer with a tokenizer.json")
    ids = tokenizer("a")["input_ids"]
    token_id = tokenizer.convert_tokens_to_ids(token)
    if ids[-1:] == [token_id]:
        log.info("the tokenizer already ends every text with %s", token)
        return
    rules = json.loads(backend.to_str()).get("post_processor")
    backend.post_processor = _post_processor(_ending_with(rules, token, token_id))


def _ending_with(rules: dict[str, Any] | None, token: str, token_id: int) -> dict[str, Any]:
    """The description of a post-processor, with one more token at the end.

    An existing template gets the token, because a second template would take the parts that the
    first one gives, such as a begin token and the text, for two texts.
    """
    rules = rules or {"type": "Sequence", "processors": []}
    steps = rules["processors"] if rules["type"] == "Sequence" else [rules]
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        template = {
            "type": "TemplateProcessing",
            "single": [first],
            "pair": [first, second],
            "special_tokens": {},
        }
        steps = [*steps, template]
    for pieces, kind in ((template["single"], 0), (template["pair"], 1)):
        pieces.append({"SpecialToken": {"id": token, "type_id": kind}})
    template["special_tokens"][token] = {"id": token, "ids": [token_id], "tokens": [token]}
    return {"type": "Sequence", "processors": steps}


def _post_processor(rules: dict[str, Any]) -> Any:
    """A post-processor from its description, by way of a tokenizer that has it."""
    from tokenizers import Tokenizer, models

    empty = json.loads(Tokenizer(models.WordLevel({}, "")).to_str())
    return Tokenizer.from_str(json.dumps({**empty, "post_processor": rules})).post_processor
