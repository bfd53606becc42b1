"""What a run shows of a training's flags, and what a resumed training was asked to do otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.arguments import RetrieverTrainingArguments, TrainingRequest

log = logging.getLogger(__name__)

RESUMED_TAG = "mlflow_dr.resumed"
LONGEST_TAG = 5000
ALWAYS_LOGGED = (
    "learning_rate",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)
NEVER_LOGGED = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token"}
# what may change when a training is resumed without changing what is learnt
WITHOUT_EFFECT = (
    *("resume_from_checkpoint", "overwrite_output_dir", "model", "publish_", "save_", "logging_"),
    *("log_", "eval_", "do_", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("dataloader_p", "dataset_proc_num", "cache_dir", "token_table", "disable_tqdm", "report_to"),
    *("torch_compile", "gc_", "grad_cache", "use_cpu", "local_rank", "ddp_", "skip_memory_metrics"),
    *("tracking_uri", "experiment_name", "validation_", "include_", "average_tokens", "run_name"),
)


def params_of(request: TrainingRequest) -> dict[str, Any]:
    """What the run shows: our own arguments, and Hugging Face's where they are not the default."""
    defaults = _defaults()
    chosen = {
        name: value
        for name, value in request.trainer.to_dict().items()
        if name in ALWAYS_LOGGED
        or (isinstance(value, bool | int | float | str) and value != defaults.get(name, value))
    }
    own = {
        "model": request.model.model_name_or_path,
        **asdict(request.model),
        **asdict(request.loss),
        **asdict(request.data),
        **_published(request),
    }
    both = {**chosen, **own}
    return {
        name: value
        for name, value in both.items()
        if value not in (None, "") and name not in NEVER_LOGGED
    }


def _published(request: TrainingRequest) -> dict[str, Any]:
    """When checkpoints are published, under the name of the flag that says it."""
    asked = request.publish
    if asked.publish_per_epoch is not None:
        return {"publish_per_epoch": asked.publish_per_epoch}
    return {"publish_steps": asked.publish_steps}


def note_changes(run: TrackedRun, request: TrainingRequest, place: str) -> None:
    """Say, and note on the run, what a resumed training is asked to do otherwise than before.

    MLflow's params are written once, so they keep the values that the training began with; the tag
    `mlflow_dr.resumed` has the others, by the checkpoint from which they hold.

    Args:
        run: that is resumed, with the params of its beginning.
        request: what is asked now.
        place: the checkpoint's name.

    Raises:
        TrackingError: the server does not answer.
    """
    data = run.fetch().data
    noted = _noted(data.tags.get(RESUMED_TAG, ""))
    before: dict[str, str] = dict(data.params)
    for values in noted.values():
        before.update(values)
    changed = changes(before, request)
    if not changed:
        return
    text = ", ".join(f"{name} {now} (was {was})" for name, (was, now) in changed.items())
    log.warning(
        "resuming with other values than before: %s; they hold from %s on, for the learning rate "
        "and the order of examples too; the run's params stay, its tag %s has these",
        *(text, place, RESUMED_TAG),
    )
    values = {name: now for name, (_, now) in changed.items()}
    noted[place] = {**noted.get(place, {}), **values}
    run.set_tags({RESUMED_TAG: json.dumps(noted)[:LONGEST_TAG]})


def changes(before: Mapping[str, str], request: TrainingRequest) -> dict[str, tuple[str, str]]:
    """name -> (value before, value now), of what changes what is learnt.

    Args:
        before: params as a run has them; a name that is missing had its default.
        request: what is asked now.
    """
    now = {**request.trainer.to_dict(), **params_of(request)}
    names = [
        name
        for name in {**before, **params_of(request)}
        if name in now and not name.startswith(WITHOUT_EFFECT) and name not in NEVER_LOGGED
    ]
    defaults = _defaults()
    pairs = {name: (str(before.get(name, defaults.get(name))), str(now[name])) for name in names}
    return {name: pair for name, pair in sorted(pairs.items()) if not _is_same(*pair)}


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default
        for field in fields(RetrieverTrainingArguments)
        if field.default is not MISSING
    }


def _noted(text: str) -> dict[str, dict[str, str]]:
    """The tag's contents; nothing where somebody has written something else there."""
    try:
        values = json.loads(text or "{}")
        return {
            str(place): {str(name): str(value) for name, value in one.items()}
            for place, one in values.items()
        }
    except (ValueError, AttributeError):
        return {}


def _is_same(one: str, other: str) -> bool:
    """Whether two spellings, such as `2e-3` and `0.002`, are of one value."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one.lower() == other.lower()
