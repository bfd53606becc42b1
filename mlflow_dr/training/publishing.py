"""Publishing checkpoints from a background thread, so that training does not wait for it."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlflow_dr.encoder.directory import restore_encoder
from mlflow_dr.errors import MlflowDrError, TrackingError, one_line
from mlflow_dr.files import atomic_write, grant_umask_modes, scratch
from mlflow_dr.tracking.checkpoints import (
    announce_checkpoint,
    mark_upload_failed,
    prepare_upload,
    upload_checkpoint,
)
from mlflow_dr.tracking.client import is_permanent, tracking_errors
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.checkpoint_source import CheckpointSource, DirectorySource, EncoderSource
from mlflow_dr.training.resume import complete_checkpoints_until, incomplete_reason

log = logging.getLogger(__name__)

WAITING_SNAPSHOTS = 2
ATTEMPTS = 4
TRIES_WHEN_REFUSED = 2  # an answer may be falsified on its way
SECONDS_BETWEEN_ATTEMPTS = 5.0
LONGEST_REASON = 300
FAILURE_TAG = "mlflow_dr.unpublished_steps"


class Publisher:
    """Takes snapshots of what is trained and publishes each as a checkpoint of a run.

    The caller waits for the copy of the weights into host memory, and only when two snapshots are
    still on their way, for the older one. A checkpoint that the server does not take is tried
    again; in the end it is reported, on the run too, and training goes on. Where another try would
    not help and nothing has been published so far, nothing will be: `refused` says so.

    Args:
        run: publishes to this run.
        source: whose weights are published.
        done: steps that the run has already, as `ready_steps` lists them; they are not published
            again, and neither is a step that was submitted before.
        attempts: how often an upload is tried.
        pause: seconds between two tries, times the number of tries so far.
        keep_in: a directory in which a checkpoint that was not published is saved, until a later
            one is published or saved; None to save none.
        on_refused: called once with the reason, on the publisher's thread, when the first
            publication is refused.

    Attributes:
        last_step: the step that was submitted last.
        unpublished: steps that were not published.
        refused: whether the first publication was refused for good.
    """

    def __init__(
        self,
        run: TrackedRun,
        source: CheckpointSource,
        done: Collection[int] = (),
        attempts: int = ATTEMPTS,
        pause: float = SECONDS_BETWEEN_ATTEMPTS,
        keep_in: Path | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        self._keep_in = keep_in
        self._on_refused = on_refused
        self._kept: Path | None = None
        self._reason = ""
        self._has_published = False
        self.refused = False
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
        snapshot = self._spare.pop() if self._spare else host_copy(weights)
        for name, value in weights.items():
            snapshot[name].copy_(value, non_blocking=True)
        wait_for_copies(weights)
        self._done.add(step)
        self._queue.put((step, snapshot))
        return True

    def publish_missed_checkpoints(self, step: int, source: CheckpointSource) -> bool:
        """Publish an earlier step from where its weights were kept, and wait for it.

        Returns:
            Whether it was published; a failure is reported as that of a submitted step is.

        Raises:
            TrackingError: it is refused for good, and it is the first.
        """
        self._done.add(step)
        published = self._publish(step, source, source.state())
        if self.refused:
            raise TrackingError(self._reason)
        return published

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

    def error(self) -> TrackingError | None:
        """What is wrong where nothing will be published, or the last step was not; else None."""
        is_refused = self.refused and not self._has_published
        if not is_refused and self.last_step not in self.unpublished:
            return None
        where = f"; the encoder is saved in {self._kept}, which publish_checkpoint takes later"
        return TrackingError(f"{self._reason[:LONGEST_REASON]}{where if self._kept else ''}")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, snapshot = item
            try:
                if self._publish(step, self._source, snapshot):
                    self._drop_kept()
                else:
                    self._keep(step, snapshot)
            finally:
                self._spare.append(snapshot)
                self._queue.task_done()

    def _publish(self, step: int, source: CheckpointSource, state: Mapping[str, Tensor]) -> bool:
        try:
            attempts = 1 if self.refused else self._attempts
            publish_state(self._run, step, source, state, attempts, self._pause)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._report(step, error)
            return False
        self._has_published = True
        return True

    def _report(self, step: int, error: Exception) -> None:
        ours = isinstance(error, MlflowDrError)
        self._reason = str(error) if ours else f"step {step} was not published: {one_line(error)}"
        self.unpublished.append(step)
        self._done.discard(step)
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
            self._run.set_tags({FAILURE_TAG: f"{steps}: {self._reason}"[:4000]})
        except Exception as second:  # noqa: BLE001 - the log has it
            log.error("nor could that be noted on the run: %s", one_line(second))

    def _keep(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Save what was not published, so that the last of it outlives the training."""
        if self._keep_in is None:
            return
        target = self._keep_in.absolute() / f"unpublished-{step}"
        try:
            if target.exists():
                shutil.rmtree(target)
            with atomic_write(target) as partial:
                self._source.save(partial, state)
                grant_umask_modes(partial)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            log.error("step %d could not be saved in %s either: %s", step, target, one_line(error))
            return
        self._drop_kept(but=target)
        self._kept = target
        log.log(logging.DEBUG if self.refused else logging.WARNING, "it is saved in %s", target)

    def _drop_kept(self, but: Path | None = None) -> None:
        if self._kept is not None and self._kept != but:
            shutil.rmtree(self._kept, ignore_errors=True)
            self._kept = None


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
    source: CheckpointSource,
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
        TrackingError: the upload failed, as often as it was tried or for good.
        Exception: what writing raised.
    """
    with scratch() as directory:
        source.save(directory, state)
        manifest = prepare_upload(directory)
        model_id: str | None = None
        refusals = 0
        for attempt in range(1, attempts + 1):
            try:
                model_id = model_id or announce_checkpoint(run, step, manifest)
                upload_checkpoint(run, model_id, directory, step)
                log.info("step %d published as models:/%s", step, model_id)
                return model_id
            except Exception as error:
                refusals = refusals + 1 if is_permanent(error) else 0
                if attempt == attempts or refusals == TRIES_WHEN_REFUSED:
                    if model_id is not None:
                        _give_up(run, model_id)
                    with tracking_errors(f"step {step} was not published"):
                        raise
                log.warning("publishing step %d: %s; trying again", step, one_line(error))
                time.sleep(pause * attempt)
    raise ValueError(f"attempts is {attempts}; at least one is needed")


def _give_up(run: TrackedRun, model_id: str) -> None:
    try:
        mark_upload_failed(run, model_id)
    except Exception as error:  # noqa: BLE001 - what the upload failed with says more
        log.error("models:/%s is left PENDING: %s", model_id, one_line(error))


def wait_for_copies(weights: Mapping[str, Tensor]) -> None:
    """Wait until what was asked of each GPU that holds weights is done."""
    for device in {value.device for value in weights.values() if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def host_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the weights in host memory; page-locked where they come from a GPU."""
    return {
        name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        for name, value in weights.items()
    }


def publish_missed_checkpoints(
    request: TrainingRequest,
    publisher: Publisher,
    source: EncoderSource,
    done: Collection[int],
    checkpoint: Path,
    is_due: PublishSchedule,
) -> None:
    """Publish what is missing from Trainer's checkpoints on this disk.

    Steps after the one that is resumed from are trained once more, and published then.

    Args:
        request: what is trained.
        publisher: of the run.
        source: the encoder as it is before training; its adapters may be others afterwards, until
            those of `checkpoint` are read.
        done: steps that are published.
        checkpoint: what is resumed from.
        is_due: after which steps there is a checkpoint.
    """
    if request.publish.publish_initial and 0 not in done:
        publisher.publish_missed_checkpoints(0, source)
    there = complete_checkpoints_until(checkpoint)
    steps = range(1, max(there, default=0) + 1)
    due = [step for step in steps if is_due(step) and step not in done]
    for step in due:
        if step in there and (problem := incomplete_reason(there[step])):
            log.warning("%s: %s", there.pop(step), problem)
        if step in there:
            log.info("step %d was left unpublished; publishing %s", step, there[step])
            publisher.publish_missed_checkpoints(step, _kept(there[step], request, source))
    if lost := [str(step) for step in due if step not in there]:
        log.warning(
            "step %s was neither published before the training was stopped nor is it whole in %s",
            *(", ".join(lost), checkpoint.parent),
        )


def _kept(directory: Path, request: TrainingRequest, source: EncoderSource) -> CheckpointSource:
    """What Trainer's checkpoint holds, as it is published."""
    if not request.model.lora:
        return DirectorySource(directory)
    # the base that the adapters name need not be theirs: that of two towers has others beside it,
    # and neither `tiny` nor a published checkpoint is found by its name
    restore_encoder(directory, source.encoder, request.model.trust_remote_code)
    return source


@dataclass(frozen=True)
class PublishSchedule:
    """Every so many steps, counted from the start or anew in each epoch.

    Attributes:
        every: steps; 0 for none.
        epoch: steps of an epoch, at whose end there is a checkpoint, too; 0 to count from the
            start.
    """

    every: int
    epoch: int = 0

    def __call__(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        counted = step % self.epoch if self.epoch else step
        return bool(self.every) and counted % self.every == 0


def publish_schedule(request: TrainingRequest, examples: int) -> PublishSchedule:
    """When a training on so many examples publishes.

    GC-DPR's `--eval_per_epoch` evaluates every `ceil(steps of an epoch / n)` steps of an epoch, and
    at its end.
    """
    if request.publish.publish_per_epoch is None:
        return PublishSchedule(request.publish.publish_steps)
    trainer = request.trainer
    batch = trainer.per_device_train_batch_size * trainer.world_size
    batches = examples // batch if trainer.dataloader_drop_last else math.ceil(examples / batch)
    epoch = max(1, math.ceil(batches / trainer.gradient_accumulation_steps))
    return PublishSchedule(math.ceil(epoch / request.publish.publish_per_epoch), epoch)
