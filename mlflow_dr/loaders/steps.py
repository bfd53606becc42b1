"""Training steps on the batches of a cell: where the time of the training process goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_dr.encoder.model import Encoder, is_static, positions
from mlflow_dr.errors import UsageError
from mlflow_dr.loaders.cell import Figures
from mlflow_dr.loaders.supply import wait_percentiles

QUERY_TOKENS = 16
LEARNING_RATE = 1e-5
HOST_PARTS = ("next", "to_device", "forward", "backward", "optimizer", "other")

Batch = Mapping[str, Tensor]


class Ranker(nn.Module):
    """The loss of a batch of documents, each with its first 16 tokens as the query.

    Args:
        encoder: makes vectors of queries and documents; of a cross-encoder, the backbone.
        cross: whether query and document are read as one text. The loss is then that of relevant
            pairs; otherwise the other documents of the batch are the negatives.

    Raises:
        UsageError: the encoder has no backbone that reads two texts together.
    """

    def __init__(self, encoder: Encoder, cross: bool) -> None:
        super().__init__()
        if cross and is_static(encoder.backbone):
            raise UsageError("ranker cross needs a transformer; this model is a table of vectors")
        self.encoder = encoder
        self._longest = positions(encoder.backbone)
        self.score = nn.Linear(encoder.width, 1) if cross else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean loss of a batch, `() float32`.

        Args:
            input_ids: token ids of the documents, `(batch, length) int64`.
            attention_mask: 1 for tokens, `(batch, length) int64`.
        """
        query_ids, query_mask = input_ids[:, :QUERY_TOKENS], attention_mask[:, :QUERY_TOKENS]
        if self.score is None:
            queries = self.encoder.query_encoder(query_ids, query_mask)
            scores = queries @ self.encoder(input_ids, attention_mask).T
            targets = torch.arange(len(scores), device=scores.device)
            return functional.cross_entropy(scores, targets)
        ids = torch.cat([query_ids, input_ids], dim=1)[:, : self._longest]
        mask = torch.cat([query_mask, attention_mask], dim=1)[:, : self._longest]
        states = self.encoder.backbone(input_ids=ids, attention_mask=mask)[0]
        return functional.softplus(-self.score(states[:, 0])).mean()


class TrainingPass:
    """Training steps on batches, with the time of each part.

    Args:
        ranker: what is trained.
        device: where it is trained.
        pinned: whether batches are in pinned memory, so that copies need not be waited for.
        world_size: training processes.
    """

    def __init__(self, ranker: Ranker, device: torch.device, pinned: bool, world_size: int) -> None:
        self._ranker = ranker.to(device).train()
        self._device = device
        self._pinned = pinned
        self._world_size = world_size

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained."""
        return self._ranker.encoder

    def measure(self, batches: Iterator[Any], steps: int) -> Figures:
        """Do the steps, after one that is not measured.

        The times of the parts are those of the host. On a GPU the work of a part goes on after it,
        and nothing here waits for it; the device's own times are read after the last step.

        Args:
            batches: at least one more than the steps.
            steps: how many.
        """
        model, optimizer = self._warmed_up(next(batches))
        seconds = dict.fromkeys(HOST_PARTS, 0.0)
        waits: list[float] = []
        events: list[tuple[Any, Any]] = []
        samples = 0
        began = stamp = time.monotonic()
        for _ in range(steps):
            started = time.monotonic()
            batch = next(batches)
            arrived = time.monotonic()
            begin = self._event()
            moved = self._moved(batch)
            copied = time.monotonic()
            loss = model(**moved)
            computed = time.monotonic()
            loss.backward()
            derived = time.monotonic()
            optimizer.step()
            optimizer.zero_grad()
            events.append((begin, self._event()))
            ended = time.monotonic()
            times = (stamp, started, arrived, copied, computed, derived, ended)
            _add(seconds, times)
            waits.append(arrived - started)
            samples += len(moved["input_ids"])
            stamp = ended
        wall = time.monotonic() - began
        busy = wall - seconds["next"] - seconds["other"]
        figures: Figures = {f"host_{part}_s": value for part, value in seconds.items()}
        figures |= {"host_wall_s": wall, **wait_percentiles(waits)}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            busy, idle = device_times(events)
            figures |= {"device_idle_fraction": idle / (busy + idle)}
        return {**figures, "model_samples_per_s": samples / busy}

    def _warmed_up(self, batch: Batch) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A first step; weights that get no gradient, such as an unused pooler, are left out."""
        self._ranker(**self._moved(batch)).backward()
        for weight in self._ranker.parameters():
            weight.requires_grad_(weight.grad is not None)
        weights = [weight for weight in self._ranker.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
        optimizer.step()
        optimizer.zero_grad()
        if self._world_size == 1:
            return self._ranker, optimizer
        devices = [self._device] if self._device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self._ranker, device_ids=devices), optimizer

    def _moved(self, batch: Batch) -> dict[str, Tensor]:
        return {
            name: values.to(self._device, non_blocking=self._pinned)
            for name, values in batch.items()
        }

    def _event(self) -> Any:
        """A mark in the device's queue of work; None without a queue."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _add(seconds: dict[str, float], times: Sequence[float]) -> None:
    """Add the parts of one step; the time before it, since the last one, is `other`."""
    order = ("other", *HOST_PARTS[:-1])
    for part, start, end in zip(order, times, times[1:], strict=False):
        seconds[part] += end - start


def device_times(events: Sequence[tuple[Any, Any]]) -> tuple[float, float]:
    """Seconds of a device in steps, and between steps with nothing to do.

    Args:
        events: CUDA events, completed, at the begin and at the end of each step.
    """
    busy = sum(begin.elapsed_time(end) for begin, end in events)
    idle = sum(end.elapsed_time(following) for (_, end), (following, _) in pairwise(events))
    return busy / 1000, idle / 1000
