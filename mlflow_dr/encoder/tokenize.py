"""Text to token ids: the template of a passage, prompts, lengths, and a digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.config import EncoderConfig


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
        """Token ids of queries, prompt and special tokens included."""
        texts = [self._config.query_prompt + query.text.strip() for query in queries]
        return self._ids(texts, self._config.query_max_length)

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
        return self._ids(self.passage_texts(passages), self._config.passage_max_length)

    def passage_digest(self) -> str:
        """Names the tokenizer and all settings that `passage_ids` depends on."""
        config = self._config
        settings = (
            config.passage_prompt,
            config.passage_max_length,
            config.title_separator,
            config.lowercase,
        )
        side = getattr(self._tokenizer, "truncation_side", "right")
        state = json.dumps([_fingerprint(self._tokenizer), side, settings])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def _ids(self, texts: list[str], max_length: int) -> list[list[int]]:
        if not texts:
            return []
        if self._config.lowercase:
            texts = [text.lower() for text in texts]
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
