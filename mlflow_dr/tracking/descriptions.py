"""What MLflow's pages say about a run and its checkpoints: names and descriptions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from mlflow_dr.files import digest_of
from mlflow_dr.tracking.checkpoints import MODEL_TYPE, Checkpoint, checkpoint_by_id
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.context import COMMAND_LINE_TAG
from mlflow_dr.tracking.results import PREFIX, TIMINGS, is_finished
from mlflow_dr.tracking.runs import DATASET_PARAM, TrackedRun
from mlflow_dr.tracking.validations import CONTEXT_TAG, recorded_values

DESCRIPTION_TAG = "mlflow_dr.description"
REPORT_TAG = "mlflow_dr.report"
FILES = ("report.html", "curve.png")  # of a report, that a description shows
BEST_VALUE = "best "  # the beginning of the tag that is a column of the list of runs
READER_DATA_PARAM = "train_file"
LONGEST_PART = 40
LONGEST_COMMAND = 1000
SEPARATORS = re.compile(r"[^A-Za-z0-9.+@_-]+")
LOADING = """```python
from mlflow.sentence_transformers import load_model
encoder = load_model("{uri}")
vectors = encoder.encode_query(["a question"])
```"""


def dated_name(*parts: str) -> str:
    """A run's name: the last part of each path or address, and the local time.

    `dated_name("data/sea", "org/small-bert")` is `sea-small-bert-1129-0741`.
    """
    return "-".join([*map(_short, parts), time.strftime("%m%d-%H%M")])


def _short(name: str) -> str:
    ends = [part.rstrip("/").rpartition("/")[2].rpartition(":")[2] for part in name.split("+")]
    return SEPARATORS.sub("-", "+".join(ends)).strip("-")[:LONGEST_PART] or "unnamed"


def charts_address(run: TrackedRun) -> str:
    """The part of an address that shows a run's charts, after the address of MLflow's pages."""
    return (
        f"#/experiments/{run.experiment_id}/runs/{run.id}/model-metrics"
        "?workflowType=machine_learning"
    )


def describe_run(run: TrackedRun) -> None:
    """Write a run's description, unless somebody else has written one or changed ours.

    Raises:
        TrackingError: the server did not take it.
    """
    tags = run.fetch().data.tags
    shown, text = tags.get(MLFLOW_RUN_NOTE, ""), _description(run, run.seen)
    is_ours = not shown or tags.get(DESCRIPTION_TAG) == digest_of(shown)
    if is_ours and shown != text:
        run.set_tags({MLFLOW_RUN_NOTE: text, DESCRIPTION_TAG: digest_of(text)})


def _description(run: TrackedRun, state: Run) -> str:
    """The best so far and the links first, because MLflow's page folds the rest."""
    params, tags = state.data.params, state.data.tags
    parts = [
        f"{key.capitalize()}: **{value}**"
        for key, value in sorted(tags.items())
        if key.startswith(BEST_VALUE)
    ]
    links = [f"[Curves]({charts_address(run)})"]
    page, picture = (f"get-artifact?path=report%2F{name}&run_uuid={run.id}" for name in FILES)
    if REPORT_TAG in tags:
        links.append(f"[Report]({page})")
    parts.append(" | ".join(links))
    trained = ", ".join(f"**{name}**{about}" for name, about in run_datasets(state, "training"))
    if model := params.get("model"):
        given = params.get(DATASET_PARAM) or params.get(READER_DATA_PARAM, "?")
        parts.append(f"Trains **{model}** on {trained or given}.")
    for key in sorted(params):
        name = key.removeprefix(PREFIX)
        if name != key:
            for dataset, about in run_datasets(state, f"validation {name}"):
                parts.append(f"Validation `{name}`: **{dataset}**{about}.")
    if REPORT_TAG in tags:
        parts.append(f"![The curve]({picture})")
    if command := tags.get(COMMAND_LINE_TAG):
        parts.append(f"```bash\n{command[:LONGEST_COMMAND]}\n```")
    return "\n\n".join(parts)


def run_datasets(state: Run, context: str) -> Iterable[tuple[str, str]]:
    """Name, and sizes in words, of the datasets that a run uses in a context.

    Args:
        state: of the run.
        context: `training`, or `validation NAME`.
    """
    inputs = state.inputs.dataset_inputs if state.inputs else ()
    for entry in inputs:
        if context not in {tag.value for tag in entry.tags if tag.key == CONTEXT_TAG}:
            continue
        try:
            profile = json.loads(entry.dataset.profile or "{}")
        except ValueError:
            profile = {}
        split = profile.pop("split", None) if isinstance(profile, dict) else None
        sizes = [f"{count:,} {what}" for what, count in profile.items() if isinstance(count, int)]
        about = ", ".join([*([f"split {split}"] if split else []), *sizes])
        yield entry.dataset.name, f" ({about})" if about else ""


def describe_checkpoint(run: TrackedRun, model_id: str) -> None:
    """Write the description of a checkpoint: its figures so far, and how to load it.

    Raises:
        TrackingError: the server did not take it.
    """
    checkpoint = checkpoint_by_id(run.client, model_id)
    text = _checkpoint_description(run, checkpoint)
    if checkpoint.tags.get(MLFLOW_RUN_NOTE) != text:
        with tracking_errors(f"describing step {checkpoint.step}"):
            run.client.set_logged_model_tags(model_id, {MLFLOW_RUN_NOTE: text})


def _checkpoint_description(run: TrackedRun, checkpoint: Checkpoint) -> str:
    names = [
        key.removeprefix(PREFIX) for key in sorted(checkpoint.params) if key.startswith(PREFIX)
    ]
    lines = [f"Step {checkpoint.step} of run {run.name}."]
    for name in names:
        if is_finished(checkpoint, name) and (values := recorded_values(checkpoint, name)):
            figures = (f"{k} **{v:.4f}**" for k, v in values.items() if k not in TIMINGS)
            lines.append(f"`{name}`: {', '.join(figures)}")
    if checkpoint.directory:
        lines.append(f"Its files are in `{checkpoint.directory}`.")
    elif checkpoint.model_type == MODEL_TYPE:
        lines.append(LOADING.format(uri=checkpoint.uri))
    return "\n\n".join(lines)
