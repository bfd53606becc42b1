"""Text to token ids: the template of a passage, prompts, lengths, and a digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.errors import CheckpointError, DataError, UsageError, one_line

SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE = ".jinja"
NO_RULES = {"is_local", "local_files_only", "model_max_length", "processor_class"}

# short ones, because a length may be short
PROBES = (
    *("", "The THE the", "don't U.S.A.'s", "naïve Straße", "a_b#c <tag> [x] {y}", "$1,234.50 20%"),
    *("  two  spaces", "tab\tline\nline\r", "soft\u00adhyphen\u200b\u00a0\ufeff", "e\u0301 ÀÉ"),
    *("ΣΑΣ İ ŉ", "Привет МИР", "東京都に行く", "北京大学生", "한국어", "ภาษาไทย"),
    *("العَرَبِيَّة", "हिन्दी", "👩\u200d👧 ☃", "ﬁ ½ Ⅳ ｶﾞ"),
    *("[CLS] [SEP] [MASK] [UNK]", "<s> </s> <pad> <unk>"),
)


def plain_tokens(name: str) -> Callable[[Sequence[str]], list[list[int]]]:
    """What makes token ids of texts without special tokens, by the tokenizer of this name.

    Args:
        name: a directory or hub name.

    Raises:
        UsageError: no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name!r}: no tokenizer of this name, in a directory, on the hub or in its cache"
        ) from error
    return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]


class Tokenizing:
    """How an encoder's texts become token ids.

    Args:
        tokenizer: a Hugging Face tokenizer.
        config: prompts, lengths and the title separator.
    """

    def __init__(self, tokenizer: Any, config: EncoderConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.pad_id: int = tokenizer.pad_token_id or 0
        self.vocabulary_size = highest_id(tokenizer) + 1

    def query_ids(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of queries, prompt and special tokens included.

        Text and tokens may stand side by side: several sets of queries are put together.
        """
        prompt, length = self._config.query_prompt, self._config.query_max_length
        texts = [prompt + self._query_text(query) for query in queries if query.tokens is None]
        tokens = [query.tokens for query in queries if query.tokens is not None]
        of_texts = iter(self._ids(texts, length))
        of_tokens = iter(self._framed(tokens, prompt, length))
        return [next(of_texts if query.tokens is None else of_tokens) for query in queries]

    def _query_text(self, query: Query) -> str:
        """A query's text without its prompt; as in DPR, a `?` before a final blank stays."""
        stripped = self._config.strip_question_mark
        return (query.text.removesuffix("?") if stripped else query.text).strip()

    def passage_texts(self, passages: Sequence[Passage]) -> list[str]:
        """The text that stands for each passage: prompt, title, separator, text."""
        separator = self._config.title_separator
        return [
            self._config.passage_prompt
            + (f"{p.title}{separator}{p.text}" if p.title else p.text).strip()
            for p in passages
        ]

    def passage_ids(self, passages: Sequence[Passage]) -> list[list[int]]:
        """Token ids of passages, prompt and special tokens included."""
        config = self._config
        if any(passage.tokens is not None for passage in passages):
            tokens = [passage.tokens or () for passage in passages]
            return self._framed(tokens, config.passage_prompt, config.passage_max_length)
        return self._ids(self.passage_texts(passages), config.passage_max_length)

    def query_digest(self) -> str:
        """Names the tokenizer and all settings that `query_ids` depends on."""
        config = self._config
        return self._digest(
            config.query_max_length,
            config.query_prompt,
            config.lowercase,
            config.strip_question_mark,
        )

    def passage_digest(self) -> str:
        """Names the tokenizer and all settings that `passage_ids` depends on."""
        config = self._config
        return self._digest(
            config.passage_max_length,
            config.passage_prompt,
            config.title_separator,
            config.lowercase,
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
        """Token ids of a probe: they show rules that are neither in the settings nor in files."""
        try:
            return self._ids([text], max_length)[0]
        except Exception:  # noqa: BLE001 - without an unknown token some texts are refused
            return None

    def _framed(
        self, rows: Sequence[Sequence[int]], prompt: str, max_length: int
    ) -> list[list[int]]:
        """Ids without special tokens -> with prompt and special tokens, within the length.

        Raises:
            DataError: an id that the tokenizer does not have.
        """
        if not rows:
            return []
        before, after = self._frame
        lead = self._bare(prompt) if prompt else []
        room = max_length - len(before) - len(after)
        if (highest := max((max(row) for row in rows if len(row)), default=0)) > (
            self.vocabulary_size - 1
        ):
            raise DataError(
                f"a tokenised text has token id {highest}, but this tokenizer's ids end at "
                f"{self.vocabulary_size - 1}; it was tokenised for another vocabulary"
            )
        whole = ([*lead, *row] for row in rows)
        cut = (ids[max(len(ids) - room, 0) :] if self._cuts_left else ids[:room] for ids in whole)
        return [[*before, *ids, *after] or [self.pad_id] for ids in cut]

    @property
    def _cuts_left(self) -> bool:
        """Whether a text that is too long loses its beginning."""
        return bool(getattr(self._tokenizer, "truncation_side", "right") == "left")

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        bare = self._bare("a")
        whole: list[int] = self._tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise DataError(
            "this tokenizer changes a text where it adds special tokens, so it cannot be used with "
            "texts that are tokenised already"
        )

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _lowered(self, text: str) -> str:
        """A text in lower case; the separator stays, which may be a special token."""
        separator = self._config.title_separator
        parts = text.split(separator) if separator.strip() else [text]
        return separator.join(part.lower() for part in parts)

    def _ids(self, texts: list[str], max_length: int) -> list[list[int]]:
        if not texts:
            return []
        if self._config.lowercase:
            texts = [self._lowered(text) for text in texts]
        try:
            encoded = self._tokenizer(
                texts,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        except Exception as error:  # the Rust library's errors are of no kind of their own
            place = getattr(self._tokenizer, "name_or_path", "")
            raise CheckpointError(
                f"{place}: the tokenizer cannot make token ids of a text ({one_line(error)}); are "
                "its files damaged?"
            ) from error
        return [ids or [self.pad_id] for ids in encoded["input_ids"]]


def highest_id(tokenizer: Any) -> int:
    """The largest token id; not `len(tokenizer) - 1` where a vocabulary leaves ids out."""
    return max(tokenizer.get_vocab().values())


def _fingerprint(tokenizer: Any) -> str:
    """Digest of a tokenizer's rules and vocabulary; truncation and padding state left out."""
    rules = [
        type(tokenizer).__name__,
        getattr(tokenizer, "split_special_tokens", False),
        _backend_rules(tokenizer) or _python_rules(tokenizer),
    ]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _backend_rules(tokenizer: Any) -> Any:
    """The rules of the library `tokenizers`; None where some of them are Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    try:
        rules = json.loads(backend.to_str())
    except Exception:  # noqa: BLE001 - what `tokenizers` raises for a part in Python
        return None
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return rules


def _python_rules(tokenizer: Any) -> Any:
    """The vocabulary and, by name, all that the tokenizer saves: its settings and its own files.

    Where the settings came from is left out, and so are those that change no token id.
    """
    saved: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        # a tokenizer of unknown origin may fail to save its vocabulary; its settings come before
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
