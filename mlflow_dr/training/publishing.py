"""Publishing checkpoints from a background thread, so that training does not wait for it."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mlflow_dr.errors import one_line
from mlflow_dr.files import scratch
from mlflow_dr.tracking.checkpoints import give_up, new_checkpoint, seal, upload_checkpoint
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.publishable import Publishable

log = logging.getLogger(__name__)

WAITING_SNAPSHOTS = 2
ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 5.0
FAILURE_TAG = "mlflow_dr.unpublished_steps"


class Submits(Protocol):
    """What is told of the steps to publish: a publisher, or one who only takes part in it."""

    last_step: int | None

    def submit(self, step: int) -> bool:
        """Take note of a step; whether it will be published from here."""


class Mate:
    """Takes part in gathering weights that processes share out, which the first one publishes."""

    def __init__(self, source: Publishable) -> None:
        self._source = source
        self.last_step: int | None = None

    def submit(self, step: int) -> bool:
        """Give our share of the weights."""
        self._source.state()
        self.last_step = step
        return False


class Publisher:
    """Takes snapshots of what is trained and publishes each as a checkpoint of a run.

    The caller waits for the copy of the weights into host memory, and only when two snapshots are
    still on their way, for the older one. A checkpoint that the server does not take is tried
    again; in the end it is reported, on the run too, and training goes on.

    Args:
        run: publishes to this run.
        source: whose weights are published.
        done: steps that the run has already, as `ready_steps` lists them; they are not published
            again, and neither is a step that was submitted before.
        attempts: how often an upload is tried.
        pause: seconds between two tries, times the number of tries so far.
    """

    def __init__(
        self,
        run: TrackedRun,
        source: Publishable,
        done: Collection[int] = (),
        attempts: int = ATTEMPTS,
        pause: float = SECONDS_BETWEEN_ATTEMPTS,
    ) -> None:
        self._run = run
        self._source = source
        self._done = set(done)
        self._attempts = attempts
        self._pause = pause
        self._queue: queue.Queue[tuple[int, dict[str, Tensor]] | None] = queue.Queue(
            WAITING_SNAPSHOTS
        )
        # memory of published snapshots: writing to fresh pages takes several times as long
        self._spare: list[dict[str, Tensor]] = []
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()
        self.last_step: int | None = None
        self.unpublished: list[int] = []

    def submit(self, step: int) -> bool:
        """Snapshot the weights and have them published as the checkpoint of this step.

        Returns:
            Whether they will be; not where the run has the step already.

        Raises:
            RuntimeError: the publisher is closed.
        """
        if not self._thread.is_alive():
            raise RuntimeError(f"step {step} comes after the publisher was closed")
        self.last_step = step
        if step in self._done:
            log.info("step %d is published already", step)
            return False
        weights = self._source.state()
        snapshot = self._spare.pop() if self._spare else _host_copy(weights)
        for name, value in weights.items():
            snapshot[name].copy_(value, non_blocking=True)
        _wait_for_copies(weights)
        self._done.add(step)
        self._queue.put((step, snapshot))
        return True

    def make_up(self, step: int, source: Publishable) -> bool:
        """Publish an earlier step from where its weights were kept, and wait for it.

        Returns:
            Whether it was published; a failure is reported as that of a submitted step is.
        """
        self._done.add(step)
        return self._publish(step, source, source.state())

    def skip(self, step: int) -> None:
        """Take it that a step is published, by somebody else."""
        self._done.add(step)

    def wait(self) -> None:
        """Wait until everything submitted so far is published, or given up."""
        if self._thread.is_alive():
            self._queue.join()

    def close(self) -> None:
        """Wait until everything submitted is published, or given up."""
        if self._thread.is_alive():
            if self._queue.unfinished_tasks:
                log.info("waiting for %d checkpoints to be published", self._queue.unfinished_tasks)
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, snapshot = item
            try:
                self._publish(step, self._source, snapshot)
            finally:
                self._spare.append(snapshot)
                self._queue.task_done()

    def _publish(self, step: int, source: Publishable, state: Mapping[str, Tensor]) -> bool:
        try:
            publish_state(self._run, step, source, state, self._attempts, self._pause)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._report(step, error)
            return False
        return True

    def _report(self, step: int, error: Exception) -> None:
        log.error("step %d was not published: %s", step, one_line(error))
        self.unpublished.append(step)
        self._done.discard(step)
        try:
            steps = ", ".join(map(str, self.unpublished))
            self._run.set_tags({FAILURE_TAG: f"{steps}: {one_line(error)}"[:4000]})
        except Exception as second:  # noqa: BLE001 - the log has it
            log.error("nor could that be noted on the run: %s", one_line(second))


def close_at_exit(publisher: Publisher) -> None:
    """Have a publisher closed when Python ends, if nobody has closed it by then."""
    _open.add(publisher)


def _close_all() -> None:
    for publisher in list(_open):
        publisher.close()


_open: weakref.WeakSet[Publisher] = weakref.WeakSet()
# `atexit` itself is too late: uploads go through thread pools, which by then take no work; their
# own exit hook is this one, and runs after ours because it was registered before
getattr(threading, "_register_atexit", atexit.register)(_close_all)


def publish_state(
    run: TrackedRun,
    step: int,
    source: Publishable,
    state: Mapping[str, Tensor],
    attempts: int = ATTEMPTS,
    pause: float = SECONDS_BETWEEN_ATTEMPTS,
) -> str:
    """Write one state of what is trained, and publish it; a failed upload is tried again.

    Args:
        run: publishes to this run.
        step: the training step of the state.
        source: what writes it.
        state: the weights.
        attempts: how often the upload is tried.
        pause: seconds between two tries, times the number of tries so far.

    Returns:
        The model id.

    Raises:
        Exception: what writing raised, or the last upload.
    """
    with scratch() as directory:
        source.save(directory, state)
        manifest = seal(directory)
        model_id: str | None = None
        for attempt in range(1, attempts + 1):
            try:
                model_id = model_id or new_checkpoint(run, step, manifest)
                upload_checkpoint(run, model_id, directory, step)
                log.info("step %d published as models:/%s", step, model_id)
                return model_id
            except Exception as error:
                if attempt == attempts:
                    if model_id is not None:
                        _give_up(run, model_id)
                    raise
                log.warning("publishing step %d: %s; trying again", step, one_line(error))
                time.sleep(pause * attempt)
    raise ValueError(f"attempts is {attempts}; at least one is needed")


def _give_up(run: TrackedRun, model_id: str) -> None:
    try:
        give_up(run, model_id)
    except Exception as error:  # noqa: BLE001 - what the upload failed with says more
        log.error("models:/%s is left PENDING: %s", model_id, one_line(error))


def _wait_for_copies(weights: Mapping[str, Tensor]) -> None:
    """Wait until what was asked of each GPU that holds weights is done."""
    for device in {value.device for value in weights.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _host_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the weights in host memory; page-locked where they come from a GPU."""
    return {
        name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        for name, value in weights.items()
    }
