"""A tokenizer of whole words and a retriever's results, both small."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from mlflow_dr.reader.sequences import SequenceBuilder

WORDS = "the cat sat on a red mat in paris . , who what where is it dog ran ##s title one two"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.BertTokenizer({word: row for row, word in enumerate(VOCABULARY)})


@pytest.fixture
def builder(tokenizer: Any) -> SequenceBuilder:
    return SequenceBuilder(tokenizer)


def passage(name: str, text: str, has_answer: bool | None, title: str = "Title") -> dict[str, Any]:
    return {"id": name, "title": title, "text": text, "score": "1.5", "has_answer": has_answer}


RESULTS = [
    {
        "question": "who sat on the mat",
        "answers": ["the cat", "cat"],
        "ctxs": [
            passage("n1", "the dog ran", False),
            passage("p1", "The cat sat, the cat ran.", True),
            passage("p2", "it is the cat", True, "Other"),
            passage("p3", "cat-like", True),
            passage("n2", "a red mat", False),
        ],
    },
    {
        "question": "where is it",
        "answers": ["Paris"],
        "ctxs": [passage("n1", "the dog ran", False)],
    },
]


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a retriever's results."""

    def write(results: Sequence[Any] = RESULTS, name: str = "results.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(results))
        return path

    return write


@pytest.fixture
def make_reader(tokenizer: Any) -> Callable[[], Any]:
    """A function that makes a small reader, the same at every call."""

    def make() -> Any:
        import torch

        from mlflow_dr.reader.model import ExtractiveReader

        torch.manual_seed(5)
        config = transformers.BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
        )
        return ExtractiveReader(config).eval()

    return make
