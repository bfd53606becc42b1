"""The params of a run, and the flags that a resumed training changes."""

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
# flags (or their beginnings) that a resumed training may change without training differently
WITHOUT_EFFECT = (
    *("resume_from_checkpoint", "overwrite_output_dir", "model", "publish_", "save_", "logging_"),
    *("log_", "eval_", "do_", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("dataloader_p", "dataset_proc_num", "cache_dir", "token_table", "disable_tqdm", "report_to"),
    *("torch_compile", "gc_", "grad_cache", "use_cpu", "local_rank", "ddp_", "skip_memory_metrics"),
    *("tracking_uri", "experiment_name", "validation_", "include_", "average_tokens", "run_name"),
)


def params_of(request: TrainingRequest) -> dict[str, Any]:
    """The params of a run: all flags of ours, and those of Hugging Face with another value."""
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
    """The flag that says when checkpoints are published."""
    publish = request.publish
    if publish.publish_per_epoch is not None:
        return {"publish_per_epoch": publish.publish_per_epoch}
    return {"publish_steps": publish.publish_steps}


def note_changes(run: TrackedRun, request: TrainingRequest, checkpoint: str) -> None:
    """Log the flags that a resumed training changes, and note them on the run.

    MLflow's params are written once and keep the first values; the tag `mlflow_dr.resumed` has the
    changes, by the checkpoint that they hold from.

    Args:
        run: the run, with the params of its beginning.
        request: the resumed training.
        checkpoint: the checkpoint's name.

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
        "resuming with changed flags: %s; they hold from %s on, also for the learning rate and the "
        "order of examples; the run's params keep the first values, its tag %s has the changes",
        *(text, checkpoint, RESUMED_TAG),
    )
    values = {name: now for name, (_, now) in changed.items()}
    noted[checkpoint] = {**noted.get(checkpoint, {}), **values}
    run.set_tags({RESUMED_TAG: json.dumps(noted)[:LONGEST_TAG]})


def changes(before: Mapping[str, str], request: TrainingRequest) -> dict[str, tuple[str, str]]:
    """Flags that change the training: name -> (value before, value now).

    Args:
        before: the params of a run; a missing one had its default.
        request: the resumed training.
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
    """The contents of the tag; empty if they are malformed."""
    try:
        values = json.loads(text or "{}")
        return {
            str(checkpoint): {str(name): str(value) for name, value in flags.items()}
            for checkpoint, flags in values.items()
        }
    except (ValueError, AttributeError):
        return {}


def _is_same(before: str, now: str) -> bool:
    """Whether two spellings, such as `2e-3` and `0.002`, mean the same value."""
    try:
        return float(before) == float(now)
    except ValueError:
        return before.lower() == now.lower()
