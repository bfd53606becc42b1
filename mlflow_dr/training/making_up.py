"""Publishing, when a training is resumed, what a kill kept from being published."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from mlflow_dr.encoder.restore import restore_encoder
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.due import Due
from mlflow_dr.training.publishable import DirectorySource, EncoderSource, Publishable
from mlflow_dr.training.publishing import Publisher
from mlflow_dr.training.resume import find_damage, whole_checkpoints_until

log = logging.getLogger(__name__)


def make_up(
    request: TrainingRequest,
    publisher: Publisher,
    source: EncoderSource,
    done: Collection[int],
    checkpoint: Path,
    is_due: Due,
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
        publisher.make_up(0, source)
    there = whole_checkpoints_until(checkpoint)
    steps = range(1, max(there, default=0) + 1)
    due = [step for step in steps if is_due(step) and step not in done]
    for step in due:
        if step in there and (problem := find_damage(there[step])):
            log.warning("%s: %s", there.pop(step), problem)
        if step in there:
            log.info("step %d was left unpublished; publishing %s", step, there[step])
            publisher.make_up(step, _kept(there[step], request, source))
    if lost := [str(step) for step in due if step not in there]:
        log.warning(
            "step %s was neither published before the training was stopped nor is it whole in %s",
            *(", ".join(lost), checkpoint.parent),
        )


def _kept(directory: Path, request: TrainingRequest, source: EncoderSource) -> Publishable:
    """What Trainer's checkpoint holds, as it is published."""
    if not request.model.lora:
        return DirectorySource(directory)
    # the base that the adapters name need not be theirs: that of two towers has others beside it,
    # and neither `tiny` nor a published checkpoint is found by its name
    restore_encoder(directory, source.encoder, request.model.trust_remote_code)
    return source
