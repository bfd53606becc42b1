"""Publishing checkpoints from a background thread, so that training does not wait for it."""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mlflow_dr.encoder.directory import save_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.tracking.checkpoints import give_up, new_checkpoint, upload_checkpoint
from mlflow_dr.tracking.manifest import write_manifest
from mlflow_dr.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

WAITING_SNAPSHOTS = 2
ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 5.0
FAILURE_TAG = "mlflow_dr.unpublished_steps"


class Publisher:
    """Takes snapshots of an encoder and publishes each as a checkpoint of a run.

    The caller waits for the copy of the weights into host memory, and only when two snapshots are
    still on their way, for the older one. A checkpoint that the server does not take is tried
    again; in the end it is reported, on the run too, and training goes on.

    Args:
        run: publishes to this run.
        encoder: whose weights are published.
        attempts: how often an upload is tried.
        pause: seconds between two tries, times the number of tries so far.
    """

    def __init__(
        self,
        run: TrackedRun,
        encoder: Encoder,
        attempts: int = ATTEMPTS,
        pause: float = SECONDS_BETWEEN_ATTEMPTS,
    ) -> None:
        self._run = run
        self._encoder = encoder
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

    def submit(self, step: int) -> None:
        """Snapshot the weights and have them published as the checkpoint of this step."""
        weights = self._encoder.state_dict()
        snapshot = self._spare.pop() if self._spare else _host_copy(weights)
        for name, value in weights.items():
            snapshot[name].copy_(value, non_blocking=True)
        if any(value.is_cuda for value in weights.values()):
            torch.cuda.current_stream().synchronize()
        self._queue.put((step, snapshot))
        self.last_step = step

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
                self._publish(step, snapshot)
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._report(step, error)
            finally:
                self._spare.append(snapshot)
                self._queue.task_done()

    def _publish(self, step: int, snapshot: dict[str, Tensor]) -> None:
        with tempfile.TemporaryDirectory(prefix="mlflow_dr-") as room:
            directory = Path(room) / "encoder"
            save_encoder(directory, self._encoder, snapshot)
            manifest = write_manifest(directory)
            model_id: str | None = None
            for attempt in range(1, self._attempts + 1):
                try:
                    model_id = model_id or new_checkpoint(self._run, step, manifest)
                    upload_checkpoint(self._run, model_id, directory, step)
                    log.info("step %d published as models:/%s", step, model_id)
                    return
                except Exception as error:
                    if attempt == self._attempts:
                        if model_id is not None:
                            give_up(self._run, model_id)
                        raise
                    log.warning("publishing step %d: %s; trying again", step, _line(error))
                    time.sleep(self._pause * attempt)

    def _report(self, step: int, error: Exception) -> None:
        log.error("step %d was not published: %s", step, _line(error))
        self.unpublished.append(step)
        try:
            steps = ", ".join(map(str, self.unpublished))
            self._run.set_tags({FAILURE_TAG: f"{steps}: {_line(error)}"[:4000]})
        except Exception as second:  # noqa: BLE001 - the log has it
            log.error("nor could that be noted on the run: %s", _line(second))


def _host_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the weights in host memory; page-locked where they come from a GPU."""
    return {
        name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        for name, value in weights.items()
    }


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
