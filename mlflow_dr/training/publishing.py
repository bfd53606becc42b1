"""Publishing checkpoints from a background thread, so that training does not wait for uploads."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mlflow_dr import compat
from mlflow_dr.encoder.model import Encoder, is_adapted
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import MlflowDrError, TrackingError, one_line
from mlflow_dr.files import atomic_write, grant_umask_modes, scratch
from mlflow_dr.tracking.checkpoints import (
    announce_checkpoint,
    mark_upload_failed,
    model_type_of,
    prepare_upload,
    run_checkpoints,
    upload_checkpoint,
)
from mlflow_dr.tracking.client import is_permanent, tracking_errors
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.disk_use import bytes_of

log = logging.getLogger(__name__)

WAITING_COPIES = 2
ATTEMPTS = 4
ATTEMPTS_WHEN_REFUSED = 2  # a proxy may have answered instead of the server
SECONDS_BETWEEN_ATTEMPTS = 5.0
LONGEST_REASON = 300
FAILURE_TAG = "mlflow_dr.unpublished_steps"


class CheckpointSource(Protocol):
    """Weights that are copied in one thread and written in another."""

    def state(self) -> Mapping[str, Tensor]:
        """The weights as they are now, not copied. The training thread calls this."""

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write a directory that `load_encoder` reads. The publisher's thread calls this.

        Args:
            directory: a path that does not exist yet.
            state: the weights that `state` returned, or a copy in host memory.
        """


class EncoderSource:
    """An encoder of ours.

    Args:
        encoder: the encoder.
        merged: whether adapters are merged into the published weights, or published alone.
    """

    def __init__(self, encoder: Encoder, merged: bool = True) -> None:
        self.encoder = encoder
        self._merged = merged
        frozen = {name for name, weight in encoder.named_parameters() if not weight.requires_grad}
        self._constant = frozen if is_adapted(encoder.backbone) else set()

    def state(self) -> Mapping[str, Tensor]:
        """The encoder's weights; with adapters, only those that change.

        Weights that are sharded among processes (FSDP) are gathered; every process must call this.
        """
        weights = self.encoder.state_dict()
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            return {name: _gathered(weight) for name, weight in weights.items()}
        return {name: weight for name, weight in weights.items() if name not in self._constant}

    @property
    def bytes(self) -> int:
        """About the size of a published checkpoint."""
        weights = self.encoder.state_dict() if self._merged else self.state()
        return bytes_of(weights.values())

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write a directory that transformers, sentence-transformers and mlflow_dr load."""
        if self._constant - state.keys():
            state = {**self.encoder.state_dict(), **state}
        save_encoder(directory, self.encoder, state, self._merged)


def _gathered(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Publisher:
    """Publishes the weights of a training as checkpoints of a run.

    `publish(step)` returns when the weights are copied into host memory; a thread writes and
    uploads them. While two copies are waiting, it also waits for the older one. A failed upload
    is tried again. If it still fails, the failure is logged and noted on the run, and training goes
    on. If the first checkpoint is refused for a reason that will last (no permission, a missing
    module), `refused` is set.

    Args:
        run: the run that gets the checkpoints. None in processes that only help to gather weights
            which are sharded among processes (FSDP); they publish nothing.
        source: the weights that are published, unless `publish` is given others.
        published: step -> model id of the checkpoints that the run has. They are not published
            again.
        attempts: number of attempts of an upload.
        pause: seconds between two attempts, times the number of attempts so far.
        keep_in: directory that keeps the last checkpoint that could not be published, until a later
            one is published; None to keep none.
        on_refused: called once, on the publisher's thread, with the reason of a refusal.

    Attributes:
        published: step -> model id of all checkpoints that the run has now.
        unpublished: steps that could not be published.
        last_step: the step that was published, or tried, last.
        refused: whether the first publication was refused for a reason that will last.
    """

    def __init__(
        self,
        run: TrackedRun | None,
        source: CheckpointSource,
        published: Mapping[int, str] | None = None,
        attempts: int = ATTEMPTS,
        pause: float = SECONDS_BETWEEN_ATTEMPTS,
        keep_in: Path | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        self.published = dict(published or {})
        self.unpublished: list[int] = []
        self.last_step: int | None = None
        self.refused = False
        self._run = run
        self._source = source
        self._attempts = attempts
        self._pause = pause
        self._keep_in = keep_in
        self._kept: Path | None = None
        self._on_refused = on_refused
        self._reason = ""
        self._has_published = False
        self._submitted: set[int] = set()
        self._queue: queue.Queue[tuple[int, CheckpointSource, dict[str, Tensor]] | None]
        self._queue = queue.Queue(WAITING_COPIES)
        # memory is used again: writing to fresh pages takes several times as long
        self._spare: list[dict[str, Tensor]] = []
        self._spare_source = source
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def publish(
        self, step: int, source: CheckpointSource | None = None, wait: bool = False
    ) -> bool:
        """Publish the weights, as they are now, as the checkpoint of a step.

        Args:
            step: the training step.
            source: the weights, if not those of the publisher.
            wait: return when the checkpoint is READY or has failed, after all earlier ones. The
                weights must not change meanwhile.

        Returns:
            Without `wait`, whether the step will be published; False if the run has it. With
            `wait`, whether this call has published it.

        Raises:
            RuntimeError: the publisher is closed.
        """
        if self._is_closed:
            raise RuntimeError(f"step {step} was published after the publisher was closed")
        source = source or self._source
        self.last_step = step
        if self._run is None:
            source.state()  # this process helps to gather the weights
            return False
        if wait:
            self.wait()
        if step in self.published or step in self._submitted:
            log.info("step %d is published already", step)
            return False
        if wait:
            return self._publish(self._run, step, source, source.state())
        if source is not self._spare_source:  # its tensors have other shapes
            self.wait()
            self._spare.clear()
            self._spare_source = source
        weights = copy_to_host(source.state(), self._spare.pop() if self._spare else None)
        self._submitted.add(step)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self._run,), name="publisher", daemon=True
            )
            self._thread.start()
        self._queue.put((step, source, weights))
        return True

    def wait(self) -> None:
        """Wait until every step so far is published or has failed."""
        self._queue.join()

    def close(self) -> None:
        """Wait until every step is published or has failed, and end the thread."""
        self._is_closed = True
        if self._thread is not None and self._thread.is_alive():
            if self._queue.unfinished_tasks:
                log.info("waiting for %d checkpoints to be published", self._queue.unfinished_tasks)
            self._queue.put(None)
            self._thread.join()

    def error(self) -> TrackingError | None:
        """Why nothing can be published, or why the last step was not; None if all is well."""
        is_refused = self.refused and not self._has_published
        if not is_refused and self.last_step not in self.unpublished:
            return None
        kept = f"; the encoder is saved in {self._kept}, publish it later by publish_checkpoint"
        return TrackingError(f"{self._reason[:LONGEST_REASON]}{kept if self._kept else ''}")

    def _work(self, run: TrackedRun) -> None:
        while (item := self._queue.get()) is not None:
            step, source, weights = item
            try:
                if self._publish(run, step, source, weights):
                    self._drop_kept()
                else:
                    self._keep(step, source, weights)
            finally:
                self._spare.append(weights)
                self._queue.task_done()
        self._queue.task_done()

    def _publish(
        self, run: TrackedRun, step: int, source: CheckpointSource, state: Mapping[str, Tensor]
    ) -> bool:
        """Publish one state; returns whether it was, and reports what went wrong."""
        try:
            attempts = 1 if self.refused else self._attempts
            model_id = publish_state(run, step, source, state, attempts, self._pause)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._report(run, step, error)
            return False
        self.published[step] = model_id
        self._has_published = True
        self.unpublished = [failed for failed in self.unpublished if failed != step]
        return True

    def _report(self, run: TrackedRun, step: int, error: Exception) -> None:
        ours = isinstance(error, MlflowDrError)
        self._reason = str(error) if ours else f"step {step} was not published: {one_line(error)}"
        self.unpublished.append(step)
        self._submitted.discard(step)
        was_refused = self.refused
        is_first = not self._has_published and isinstance(error, TrackingError)
        self.refused = was_refused or (is_first and is_permanent(error))
        if self.refused and self._on_refused is not None:
            if not was_refused:
                self._on_refused(self._reason)
        elif not was_refused:
            log.error("%s", self._reason)
        try:
            steps = ", ".join(map(str, self.unpublished))
            run.set_tags({FAILURE_TAG: f"{steps}: {self._reason}"[:4000]})
        except Exception as second:  # noqa: BLE001 - the log has it
            log.error("the failure could not be noted on the run: %s", one_line(second))

    def _keep(self, step: int, source: CheckpointSource, state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint that was not published, so that the last one outlives the training."""
        if self._keep_in is None:
            return
        target = self._keep_in.absolute() / f"unpublished-{step}"
        try:
            if target.exists():
                shutil.rmtree(target)
            with atomic_write(target) as partial:
                source.save(partial, state)
                grant_umask_modes(partial)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            log.error("step %d could not be saved in %s either: %s", step, target, one_line(error))
            return
        self._drop_kept(but=target)
        self._kept = target
        level = logging.DEBUG if self.refused else logging.WARNING
        log.log(level, "step %d is saved in %s", step, target)

    def _drop_kept(self, but: Path | None = None) -> None:
        if self._kept is not None and self._kept != but:
            shutil.rmtree(self._kept, ignore_errors=True)
            self._kept = None


def published_checkpoints(run: TrackedRun) -> dict[int, str]:
    """Step -> model id of a run's READY checkpoints, the first of a step.

    Raises:
        TrackingError: the server does not answer.
    """
    ready = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready]
    return {checkpoint.step: checkpoint.model_id for checkpoint in reversed(ready)}


def copy_to_host(
    weights: Mapping[str, Tensor], memory: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A copy of weights in host memory, page-locked if they come from a GPU.

    Args:
        weights: name -> weight.
        memory: a former copy of the same weights, which is overwritten.
    """
    if memory is None:
        memory = {
            name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            for name, value in weights.items()
        }
    for name, value in weights.items():
        memory[name].copy_(value, non_blocking=True)
    for device in {value.device for value in weights.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return memory


def close_at_exit(publisher: Publisher) -> None:
    """Have a publisher closed when Python ends, unless it has been closed by then."""
    if not _open:
        # plain `atexit` is too late: uploads use thread pools, which take no work by then
        compat.register_before_thread_pools_end(_close_all)
    _open.add(publisher)


def _close_all() -> None:
    for publisher in list(_open):
        publisher.close()


_open: weakref.WeakSet[Publisher] = weakref.WeakSet()


def publish_state(
    run: TrackedRun,
    step: int,
    source: CheckpointSource,
    state: Mapping[str, Tensor],
    attempts: int = ATTEMPTS,
    pause: float = SECONDS_BETWEEN_ATTEMPTS,
) -> str:
    """Write weights to a directory and upload it as a checkpoint; returns its model id.

    Raises:
        TrackingError: every attempt failed, or the first ones for a reason that will last.
        Exception: what writing the directory raised.
    """
    with scratch() as directory:
        source.save(directory, state)
        manifest, model_type = prepare_upload(directory), model_type_of(directory)
        model_id: str | None = None
        refusals = 0
        for attempt in range(1, attempts + 1):
            try:
                model_id = model_id or announce_checkpoint(run, step, manifest, model_type)
                upload_checkpoint(run, model_id, directory, step)
                log.info("step %d published as models:/%s", step, model_id)
                return model_id
            except Exception as error:
                refusals = refusals + 1 if is_permanent(error) else 0
                if attempt == attempts or refusals == ATTEMPTS_WHEN_REFUSED:
                    if model_id is not None:
                        _mark_failed(run, model_id)
                    with tracking_errors(f"step {step} was not published"):
                        raise
                log.warning("publishing step %d: %s; trying again", step, one_line(error))
                time.sleep(pause * attempt)
    raise ValueError(f"attempts is {attempts}; at least one is needed")


def _mark_failed(run: TrackedRun, model_id: str) -> None:
    try:
        mark_upload_failed(run, model_id)
    except Exception as error:  # noqa: BLE001 - the reason of the upload's failure says more
        log.error("models:/%s is left PENDING: %s", model_id, one_line(error))
