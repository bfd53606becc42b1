"""Checkpoints that a killed training saved but could not publish."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mlflow_dr.encoder.saving import restore_encoder
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.checkpoint_source import DirectorySource
from mlflow_dr.training.publishing import CheckpointSource, EncoderSource, Publisher
from mlflow_dr.training.resume import complete_checkpoints_until, incomplete_reason

log = logging.getLogger(__name__)


def publish_missed_checkpoints(
    request: TrainingRequest,
    publisher: Publisher,
    source: EncoderSource,
    checkpoint: Path,
    schedule: Callable[[int], bool],
) -> None:
    """Publish the steps that a killed training could not publish, from the trainer's checkpoints.

    Steps after the checkpoint that is resumed from are trained again, and published then.

    Args:
        request: the resumed training.
        publisher: of its run.
        source: the encoder as it is before the first step. Its adapters are overwritten by those of
            the checkpoints; resuming restores them.
        checkpoint: what is resumed from.
        schedule: after which steps there is a checkpoint.

    Raises:
        TrackingError: the first of them is refused for a reason that will last.
    """

    def publish(step: int, weights: CheckpointSource) -> None:
        publisher.publish(step, weights, wait=True)
        if publisher.refused and (error := publisher.error()) is not None:
            raise error

    if request.publish.publish_initial and 0 not in publisher.published:
        publish(0, source)
    complete = complete_checkpoints_until(checkpoint)
    steps = range(1, max(complete, default=0) + 1)
    missed = [step for step in steps if schedule(step) and step not in publisher.published]
    for step in missed:
        if step in complete and (reason := incomplete_reason(complete[step])):
            log.warning("%s: %s", complete.pop(step), reason)
        if step not in complete:
            continue
        log.info("step %d was not published; publishing %s", step, complete[step])
        if request.model.lora:
            # the base that an adapter names need not be found: tiny, a published checkpoint and one
            # of two encoders are not
            restore_encoder(complete[step], source.encoder, request.model.trust_remote_code)
            publish(step, source)
        else:
            publish(step, DirectorySource(complete[step]))
    if lost := [str(step) for step in missed if step not in complete]:
        log.warning(
            "step %s was not published before the training was stopped, and %s has no complete "
            "checkpoint of it",
            *(", ".join(lost), checkpoint.parent),
        )
