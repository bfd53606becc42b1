"""Checkpoints that are malformed in one way each, as a trainer or a person may leave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow_dr.files import file_sha256
from mlflow_dr.tracking.checkpoints import (
    STEP_TAG,
    announce_checkpoint,
    prepare_upload,
    publish,
    upload_checkpoint,
)
from mlflow_dr.tracking.manifest import MANIFEST
from mlflow_dr.tracking.runs import TrackedRun

Make = Callable[[TrackedRun, Path, int], str]
"""Publishes a copy of a sound encoder, made malformed, at a step; returns its model id."""

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
RECORD = "mlflow_dr.validation.val"


def _changed(change: Callable[[Path], object]) -> Make:
    """Change the files before the manifest is written."""

    def make(run: TrackedRun, directory: Path, step: int) -> str:
        change(directory)
        return publish(run, directory, step)

    return make


def _listed(manifest: Callable[[dict[str, Any]], object]) -> Make:
    """Change the manifest; its digest is correct."""

    def make(run: TrackedRun, directory: Path, step: int) -> str:
        prepare_upload(directory)
        path = directory / MANIFEST
        path.write_text(json.dumps(manifest(json.loads(path.read_text()))))
        model_id = announce_checkpoint(run, step, file_sha256(path))
        upload_checkpoint(run, model_id, directory, step)
        return model_id

    return make


def _tagged(key: str, value: str) -> Make:
    """Change a tag of the model."""

    def make(run: TrackedRun, directory: Path, step: int) -> str:
        model_id = publish(run, directory, step)
        run.client.set_logged_model_tags(model_id, {key: value})
        return model_id

    return make


def _noted(key: str, value: str) -> Make:
    """Add a parameter that no validator would write."""

    def make(run: TrackedRun, directory: Path, step: int) -> str:
        model_id = publish(run, directory, step)
        run.client.log_model_params(model_id, {key: value})
        return model_id

    return make


def _config(**values: object) -> Make:
    return _changed(lambda directory: _update(directory / CONFIG, values))


def _update(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _adapter_of_itself(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / WEIGHTS).rename(directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": ".", "task_type": None, "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))


def _each_file(entry: object) -> Make:
    return _listed(lambda files: dict.fromkeys(files, entry))


MALFORMED: Mapping[str, Make] = {
    "no activation": _config(hidden_act=None),
    "config is a list": _changed(lambda directory: (directory / CONFIG).write_text("[1]")),
    "config nested deeply": _changed(
        lambda directory: (directory / CONFIG).write_text("[" * 100_000 + "]" * 100_000)
    ),
    "million layers": _config(num_hidden_layers=1_000_000),
    "negative width": _config(hidden_size=-1),
    "wordy width": _config(hidden_size="wide"),
    "no weights": _changed(lambda directory: (directory / WEIGHTS).unlink()),
    "cut weights": _changed(
        lambda directory: (directory / WEIGHTS).write_bytes(
            (directory / WEIGHTS).read_bytes()[:5000]
        )
    ),
    "tokenizer is a list": _changed(
        lambda directory: (directory / "tokenizer.json").write_text("[]")
    ),
    "settings are a list": _changed(
        lambda directory: (directory / "mlflow_dr.json").write_text("[]")
    ),
    "adapter of itself": _changed(_adapter_of_itself),
    "manifest is a list": _listed(lambda files: list(files)),
    "manifest of numbers": _each_file(7),
    "manifest of null": _each_file(None),
    "manifest without sizes": _each_file({}),
    "manifest with a NUL": _listed(lambda files: {**files, "a\0b": files[CONFIG]}),
    "manifest with a folder": _listed(lambda files: {**files, ".": files[CONFIG]}),
    "empty manifest": _listed(lambda files: {}),
    "step abc": _tagged(STEP_TAG, "abc"),
    "step of 4,900 digits": _tagged(STEP_TAG, "9" * 4900),
    "step below 0": _tagged(STEP_TAG, "-1"),
    "record that is no JSON": _noted(RECORD, "{"),
    "record of another kind": _noted(RECORD, "[1]"),
    "record of words": _noted(RECORD, json.dumps({"values": {"mrr_at_10": "high"}})),
    "claim of nobody": _noted(f"{RECORD}.claim.1", "[]"),
    "claim without a number": _noted(f"{RECORD}.claim.²", "{}"),
}
