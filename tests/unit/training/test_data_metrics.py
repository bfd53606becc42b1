"""How examples reach the training: the counts of a loader, and what is written of them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from mlflow_dr.process_tree import TreeSample
from mlflow_dr.training import data_metrics
from mlflow_dr.training.callbacks import MetricCallback
from mlflow_dr.training.data_metrics import DataMetrics, Supply
from mlflow_dr.training.encoder_setup import collator_of

Make = Callable[..., Any]


class Clock:
    """Tells the time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(data_metrics, "time", clock)
    return clock


def batch_of(queries: int, n_tokens: int, places: tuple[int, int]) -> dict[str, Any]:
    ids = torch.zeros(places, dtype=torch.long)
    return {
        "query": {"input_ids": ids[:queries]},
        "passage": {"input_ids": ids[queries:]},
        "query_ids": [f"q{number}" for number in range(queries)],
        "n_tokens": n_tokens,
    }


def loader(clock: Clock, *seconds: float) -> Iterator[dict[str, Any]]:
    """Batches of 2 queries and 2 passages with 30 tokens in 40 places, after so many seconds."""
    for wait in seconds:
        clock.now += wait
        yield batch_of(queries=2, n_tokens=30, places=(4, 10))


def test_waiting_is_a_share_of_the_time_since_the_last_metrics(clock: Clock) -> None:
    supply = Supply()
    clock.now += 5
    supply.begin()
    for _ in supply.timed(loader(clock, 1.0, 2.0)):
        clock.now += 0.5
    metrics = supply.take(processes=3)
    assert metrics["wait_fraction"] == pytest.approx(3 / 4)
    assert metrics["wait_p99_ms"] == pytest.approx(1990)
    assert metrics["samples_per_second"] == pytest.approx(3 * 4 / 4)
    assert metrics["padding_fraction"] == pytest.approx(1 / 4)
    for _ in supply.timed(loader(clock, 1.0)):
        clock.now += 3.0
    assert supply.take(1)["wait_fraction"] == pytest.approx(1 / 4)
    assert supply.take(1) == {}


def test_a_loader_can_be_counted_step_by_step_to_its_end(clock: Clock) -> None:
    """As Trainer does it, which asks for as many batches as a step has."""
    supply, batches = Supply(), loader(clock, 1.0, 1.0, 1.0)
    steps = [list(islice(supply.timed(batches), 2)) for _ in range(3)]
    assert [len(step) for step in steps] == [2, 1, 0]
    assert supply.take(1)["wait_fraction"] == 1


def test_padding_is_what_the_masks_say(tiny: Any, colours: Any, set_of: Make) -> None:
    batches = DataLoader(set_of(tiny, colours, 2), batch_size=4, collate_fn=collator_of(tiny))
    supply = Supply()
    masks = [
        batch[role]["attention_mask"].flatten()
        for batch in supply.timed(iter(batches))
        for role in ("query", "passage")
    ]
    expected = 1 - torch.cat(masks).double().mean()
    assert supply.take(1)["padding_fraction"] == pytest.approx(float(expected))
    assert 0 < expected < 1


def test_batches_of_an_unknown_collator_have_no_padding(clock: Clock) -> None:
    supply = Supply()
    clock.now += 1
    list(supply.timed(iter([{"query": {}}])))
    assert supply.take(1) == {"wait_fraction": 0, "wait_p99_ms": 0, "samples_per_second": 0}


def sample(time: float, read_bytes: int) -> TreeSample:
    return TreeSample(time, 2_000_000, 3_000_000, 0, 0, 1.0, read_bytes)


@pytest.fixture
def written() -> list[tuple[int, dict[str, float]]]:
    return []


@pytest.fixture
def log_step(clock: Clock, written: list[tuple[int, dict[str, float]]]) -> Make:
    """A function from a step, the last sample and what Trainer logs to what is written.

    The first three steps are on the run already.
    """

    def write(metrics: Mapping[str, float], step: int) -> None:
        written.append((step, {name: metrics[name] for name in metrics if name[:5] == "data/"}))

    sampler: Any = SimpleNamespace(latest=sample(10.0, 1_000_000))
    supply = Supply()
    callback = MetricCallback(write, last_step=3, data=DataMetrics(supply, sampler))
    arguments, control = SimpleNamespace(world_size=2), TrainerControl()
    callback.on_train_begin(arguments, TrainerState(), control)

    def log_step(step: int, latest: TreeSample | None, **logs: float) -> None:
        list(supply.timed(loader(clock, 1.0)))
        sampler.latest = latest
        callback.on_log(arguments, TrainerState(global_step=step), control, logs)

    return log_step


def test_metrics_are_written_with_the_loss_and_never_twice(
    log_step: Make, written: list[tuple[int, dict[str, float]]]
) -> None:
    for step in (2, 3, 4):
        log_step(step, sample(10.0 + step, 1_000_000 * step), loss=1.0)
    log_step(4, sample(20.0, 0), train_loss=1.0)
    assert [step for step, metrics in written if metrics] == [4]
    assert written[0][1] == pytest.approx(
        {
            "data/wait_fraction": 1,
            "data/wait_p99_ms": 1000,
            "data/samples_per_second": 4,
            "data/padding_fraction": 0.25,
            "data/memory_private_mb": 2,
            "data/memory_page_cache_mb": 3,
            "data/read_mb_per_second": 1,
        }
    )


def test_disk_reads_need_a_new_sample(
    log_step: Make, written: list[tuple[int, dict[str, float]]]
) -> None:
    log_step(4, sample(10.0, 1_000_000), loss=1.0)
    log_step(5, None, loss=1.0)
    log_step(6, sample(14.0, 9_000_000), loss=1.0)
    found = [metrics.get("data/read_mb_per_second") for _, metrics in written]
    assert found == [None, None, 2.0]
    assert "data/memory_private_mb" not in written[1][1]
