"""Small encoders, batches and examples that the tests of training share."""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.training.batches import Texts, TrainingSet, training_set
from mlflow_dr.training.encoder_setup import collator_of
from mlflow_dr.training.loss import Objective

COLOURS = ("red", "green", "blue", "white", "black", "pink", "brown", "grey")


@pytest.fixture(autouse=True)
def quick_collections() -> None:
    """Trainers run the garbage collector at their end.

    Freezing what is imported makes this fast, also here. What the last test left in circles is
    freed before, with its open files.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny(make_tiny: Callable[..., Encoder]) -> Encoder:
    """A fresh encoder of few weights."""
    return make_tiny(pooling="mean", normalize=True, passage_max_length=64)


@pytest.fixture
def make_small(make_tiny: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """A function from dropout, seed and encoder settings to a fresh encoder of even fewer weights.

    Its weights are of the size of trained ones, so that its vectors differ from each other.
    """

    def make(dropout: float = 0.0, seed: int = 0, **settings: Any) -> Encoder:
        from transformers import BertConfig, BertModel

        tiny = make_tiny(**{"pooling": "mean", **settings})
        config = BertConfig(
            vocab_size=len(tiny.tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
            pad_token_id=tiny.tokenizer.pad_token_id,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = BertModel(config, add_pooling_layer=False)
            return Encoder(backbone, tiny.tokenizer, tiny.settings)

    return make


@pytest.fixture
def make_texts() -> Callable[..., Texts]:
    """A function from the lengths of texts to random token ids, padded at the right."""

    def make(lengths: Sequence[int], seed: int = 0) -> Texts:
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(5, 60, mask.shape, generator=generator)
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make


class Listed(NamedTuple):
    """Examples held in memory."""

    passages: Corpus
    examples: Sequence[Example]
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def negative_counts(self) -> np.ndarray:
        return np.array([len(example.negatives) for example in self.examples])


@pytest.fixture
def make_examples() -> Callable[..., Listed]:
    """A function from (query id, positive texts, negative texts, scores or None) to examples.

    Passages get their text as id; one text is one passage.
    """

    def make(*rows: tuple[Any, ...], digest: str = "listed") -> Listed:
        rows = tuple((*row, None)[:4] for row in rows)
        texts = list(dict.fromkeys(t for _, good, bad, _ in rows for t in (*good, *bad)))
        rows_of = {text: row for row, text in enumerate(texts)}
        strings = pa.array(texts, pa.string())
        blank = pa.array([""] * len(texts), pa.string())
        table = pa.table({"id": strings, "title": blank, "text": strings})
        examples = [
            Example(
                Query(name, f"what is {name}"),
                np.array([rows_of[text] for text in good], np.int64),
                np.array([rows_of[text] for text in bad], np.int64),
                None if scores is None else np.array(scores, np.float32),
            )
            for name, good, bad, scores in rows
        ]
        return Listed(Corpus(table), examples, digest)

    return make


@pytest.fixture
def colours(make_examples: Callable[..., Listed]) -> Listed:
    """Eight questions; each has two right passages and three wrong ones of its own.

    No two passages have the same token ids.
    """
    return make_examples(
        *(
            (
                word,
                [f"all about {word} {when}" for when in ("at night", "at noon")],
                [f"never about {word} but {other}" for other in ("sea", "sky", "sand")],
            )
            for word in COLOURS
        ),
        digest="colours",
    )


@pytest.fixture
def set_of() -> Callable[..., TrainingSet]:
    """A function from an encoder and examples to their training set."""

    def make(encoder: Encoder, examples: Any, n_passages: int = 1, **options: Any) -> TrainingSet:
        from mlflow_dr.training.encoder_setup import _tokenizings

        options = {"seed": 0, **options}
        return training_set(examples, *_tokenizings(encoder), n_passages=n_passages, **options)

    return make


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    """Ten passages with titles; eight of them answer a training query."""
    corpus = {f"p{i}": (f"title {i}", text) for i, text in enumerate(texts)}
    queries = {f"q{i}": " ".join(text.split()[1:4]) for i, text in enumerate(texts)}
    judged = {f"q{i}": {f"p{i}": 1} for i in range(10)}
    train = {name: judged[name] for name in list(judged)[:8]}
    return beir_folder(corpus, queries, train=train, dev={"q9": judged["q9"]})


@pytest.fixture
def saved(make_small: Callable[..., Encoder], tmp_path: Path) -> Path:
    """The directory of a small encoder with mean pooling."""
    save_encoder(tmp_path / "saved", make_small())
    return tmp_path / "saved"


@pytest.fixture
def scored(tmp_path: Path, texts: list[str]) -> Path:
    """A file of Tevatron's with a positive and three negatives each, and a teacher's scores."""

    words = " ".join(texts).split()

    def passage(number: int) -> dict[str, Any]:
        text = " ".join(words[2 * number : 2 * number + 5])
        return {"docid": f"d{number}", "title": "", "text": text, "score": float(number)}

    lines = [
        json.dumps(
            {
                "query_id": f"s{i}",
                "query": " ".join(words[8 * i : 8 * i + 3]),
                "positive_passages": [passage(4 * i)],
                "negative_passages": [passage(4 * i + n) for n in (1, 2, 3)],
            }
        )
        for i in range(6)
    ]
    (tmp_path / "scored.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "scored.jsonl"


@pytest.fixture
def make_trainer(tmp_path: Path, colours: Listed, set_of: Callable[..., TrainingSet]) -> Callable:
    """A function from an encoder and training arguments to a trainer of it, on the colours.

    `kind` is the trainer's class; torch's by default.
    """

    def make(
        encoder: Encoder,
        directory: Path = tmp_path,
        callbacks: Sequence[Any] = (),
        training_set: Any = None,
        objective: Objective | None = None,
        chunk_sizes: Mapping[str, int] | None = None,
        kind: Any = None,
        **arguments: Any,
    ) -> Any:
        from mlflow_dr.training.arguments import RetrieverTrainingArguments
        from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "use_cpu": True,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "warmup_steps": 0,
            **arguments,
        }
        parts = TrainerParts(
            encoder,
            RetrieverTrainingArguments(output_dir=str(directory), **settings),
            training_set or set_of(encoder, colours),
            collator_of(encoder),
            objective or Objective(temperature=0.05),
            callbacks,
            chunk_sizes,
            "run-1",
        )
        return (kind or RetrieverTrainer)(parts)

    return make
