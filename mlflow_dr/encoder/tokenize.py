"""Text to token ids: the template of a passage, prompts, lengths, and a digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.errors import DataError, UsageError


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
            config.query_prompt,
            config.query_max_length,
            config.lowercase,
            config.strip_question_mark,
        )

    def passage_digest(self) -> str:
        """Names the tokenizer and all settings that `passage_ids` depends on."""
        config = self._config
        return self._digest(
            config.passage_prompt,
            config.passage_max_length,
            config.title_separator,
            config.lowercase,
        )

    def _digest(self, *settings: object) -> str:
        side = getattr(self._tokenizer, "truncation_side", "right")
        state = json.dumps([_fingerprint(self._tokenizer), side, settings])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

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
        encoded = self._tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [ids or [self.pad_id] for ids in encoded["input_ids"]]


def highest_id(tokenizer: Any) -> int:
    """The largest token id; not `len(tokenizer) - 1` where a vocabulary leaves ids out."""
    return max(tokenizer.get_vocab().values())


def _fingerprint(tokenizer: Any) -> str:
    """Digest of a tokenizer's rules and vocabulary; truncation and padding state left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
