"""Two gloo ranks, one a fork of the other, that compute the given cases and write the results.

    python two_ranks.py DIRECTORY PORT

`DIRECTORY/given.pt` has the cases and their inputs; each rank writes `DIRECTORY/<rank>.pt`.
"""

import os
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.models.bert.modeling_bert import BertModel  # noqa: F401 - before the fork

from mlflow_dr.training.arguments import RetrieverTrainingArguments
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.grad_cache import cached_vectors
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

RANKS = 2
Reduced = list[tuple[int, int]]


def counted(reduced: Reduced, model: DistributedDataParallel) -> None:
    """Have each all-reduce noted: the bucket's number, and how many numbers it has."""

    def hook(_: None, bucket: GradBucket) -> Future[Tensor]:
        reduced.append((bucket.index(), bucket.buffer().numel()))
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)


def share(values: Tensor, rank: int) -> Tensor:
    """A rank's rows of a batch."""
    size = len(values) // RANKS
    return values[rank * size : (rank + 1) * size]


def computed(case: Mapping[str, Any], given: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Loss and gradients of two steps of one case, each over all its batches."""
    encoder = given["encoders"][case["encoder"]].train()
    encoder.zero_grad()
    model = DistributedDataParallel(BiEncoder(encoder), bucket_cap_mb=0.02, broadcast_buffers=False)
    reduced: Reduced = []
    counted(reduced, model)
    objective: Objective = case["objective"]
    steps: list[dict[str, Any]] = []
    for _ in range(2):
        reduced.clear()
        model.zero_grad()
        losses = []
        for number, batch in enumerate(case["batches"], start=1):
            texts = {
                role: {name: share(values, rank) for name, values in batch[role].items()}
                for role in ("query", "passage")
            }
            # as Trainer does
            last = number == len(case["batches"])
            with nullcontext() if last else model.no_sync():
                if case["sizes"]:
                    vectors = cached_vectors(model, texts, case["sizes"], model.no_sync)
                else:
                    vectors = model(texts)
                keys, teacher = share(batch["keys"], rank), share(batch["teacher"], rank)
                loss = objective(vectors["query"], vectors["passage"], keys, teacher)
                (loss / len(case["batches"])).backward()
            losses.append(loss.item())
        grads = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        steps.append({"losses": losses, "gradients": grads, "reduced": list(reduced)})
    return {"steps": steps, "trainable": sum(v.numel() for v in grads.values())}


class Watched(Objective):
    """The objective; remembers the keys of each batch."""

    def __call__(self, queries: Tensor, passages: Tensor, keys: Any = None, *_: Any) -> Tensor:
        self.__dict__.setdefault("keys", []).append(keys.tolist())
        return super().__call__(queries, passages, keys)


class Counting(TrainerCallback):
    """Notes the all-reduces of each step of Trainer's."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.reduced: Reduced = []
        self.steps: list[Reduced] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        counted(self.reduced, self.trainer.model_wrapped)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(list(self.reduced))
        self.reduced.clear()


def trained(case: Mapping[str, Any], given: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What our Trainer reads in some steps, and losses and weights after them."""
    encoder = given["encoders"][case["encoder"]]
    counting = Counting()
    watched = Watched(**asdict(case["objective"]))
    parts = TrainerParts(
        encoder,
        RetrieverTrainingArguments(
            output_dir=str(directory / case["directory"]), **case["arguments"]
        ),
        case["training_set"],
        case["collator"],
        watched,
        [counting],
        case["sizes"],
    )
    trainer = RetrieverTrainer(parts)
    counting.trainer = trainer
    trainer.resume(directory / case["directory"] / case["resumed"] if case["resumed"] else None)
    return {
        "keys": watched.__dict__["keys"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": encoder.state_dict(),
        "reduced": counting.steps,
        "trainable": sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad),
    }


def work(rank: int, directory: Path, port: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    warnings.simplefilter("ignore")
    # makes the process group
    assert RetrieverTrainingArguments(use_cpu=True, ddp_backend="gloo").world_size == RANKS
    given = torch.load(directory / "given.pt", weights_only=False)
    kinds = {
        "steps": partial(computed, rank=rank),
        "trainer": partial(trained, directory=directory),
    }
    found = {name: kinds[case["kind"]](case, given) for name, case in given["cases"].items()}
    torch.save(found, directory / f"{rank}.pt")
    distributed.destroy_process_group()


def main(directory: Path, port: str) -> None:
    other = os.fork()
    if not other:
        work(1, directory, port)
        return
    try:
        work(0, directory, port)
        _, status = os.waitpid(other, 0)
    except BaseException:
        os.kill(other, signal.SIGKILL)  # it waits for this one
        raise
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
