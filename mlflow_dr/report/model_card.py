"""The card of an encoder on the Hugging Face hub: its figures, its curve, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from mlflow_dr.collection.locations import hub_name
from mlflow_dr.report.contents import MEAN, Curve, RunReport
from mlflow_dr.report.figures import FULL, shown_measure
from mlflow_dr.terminal import printable, without_secrets
from mlflow_dr.tracking.context import COMMAND_LINE_TAG
from mlflow_dr.tracking.descriptions import run_datasets
from mlflow_dr.tracking.runs import DATASET_PARAM
from mlflow_dr.tracking.validations import validation_collection
from mlflow_dr.version import VERSION

MARK = "<!-- written by mlflow-dr best --push -->"
PICTURE = "curve.png"
TASK = {"type": "text-retrieval", "name": "Text retrieval"}
SETTINGS = ("pooling", "normalize", "query_prefix", "passage_prefix", "q_max_len", "p_max_len")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")


def model_card(report: RunReport, repo: str, licence: str | None) -> str:
    """The card of a run's best checkpoint: metadata that the hub reads, and a page.

    Args:
        report: of the run.
        repo: `OWNER/NAME` of the repository.
        licence: the hub's identifier of one, such as `apache-2.0`; None if it is not known.
    """
    metadata = yaml.safe_dump(_metadata(report, repo, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n{MARK}\n\n" + "\n\n".join(_sections(report, repo, licence)) + "\n"


def _metadata(report: RunReport, repo: str, licence: str | None) -> dict[str, Any]:
    params = report.run.seen.data.params
    model, dataset = str(params.get("model", "")), str(params.get(DATASET_PARAM, ""))
    results = [_result(report, curve) for curve in report.curves if _row(curve, report)]
    values: dict[str, Any] = {
        "license": licence,
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "dense-retrieval", "mlflow"],
        "base_model": model if "/" in model and hub_name(model) else None,
        "datasets": [_repository(dataset)] if _repository(dataset) else None,
        "model-index": [{"name": repo.partition("/")[2], "results": results}],
    }
    return {key: value for key, value in values.items() if value}


def _repository(dataset: str) -> str:
    """The repository of a collection on the hub; empty for other collections."""
    name = hub_name(dataset) if not dataset.startswith(("/", ".")) else None
    return name.repo if name else ""


def _result(report: RunReport, curve: Curve) -> dict[str, Any]:
    """The figures of a validation, as the hub lists them."""
    dataset = validation_collection(report.run, curve.name) or "unknown"
    row = _row(curve, report)
    return {
        "task": TASK,
        "dataset": {
            "name": _short(dataset) + ("" if curve.subset in (FULL, MEAN) else " (subset)"),
            "type": _repository(dataset) or _short(dataset),
        },
        "metrics": [
            {"type": key, "name": f"{curve.name}: {shown_measure(key)}", "value": round(value, 6)}
            for key, value in row.items()
        ],
    }


def _row(curve: Curve, report: RunReport) -> dict[str, float]:
    """The measures of the best checkpoint in a validation; empty if it has none."""
    best = report.best.checkpoint.step
    for step, values in zip(curve.steps, curve.values, strict=True):
        if step == best:
            return {key: values[key] for key in curve.measures if key in values}
    return {}


def _short(dataset: str) -> str:
    """The name of a collection without the folders that lead to it on the trainer's machine."""
    return dataset.rstrip("/").rpartition("/")[2] if dataset.startswith(("/", ".")) else dataset


def _sections(report: RunReport, repo: str, licence: str | None) -> Iterator[str]:
    best, params = report.best.first, report.run.seen.data.params
    trained_on = _short(str(params.get(DATASET_PARAM, "an unknown collection")))
    yield f"# {repo.partition('/')[2]}"
    yield (
        "This is a dense retriever: it makes vectors of queries and of passages, and the dot "
        "product of two vectors says how well the passage fits. "
        f"It was trained from {_text(_short(str(params.get('model', 'an encoder'))))} on "
        f"{_text(trained_on)}, and is the checkpoint of step {best.checkpoint.step}, the best of "
        f"its run by {report.metric}."
    )
    yield "## Use"
    yield (
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'encoder = SentenceTransformer("{repo}")\n'
        'queries = encoder.encode_query(["a question"])\n'
        'passages = encoder.encode_document(["a passage"])\n'
        "scores = queries @ passages.T\n```"
    )
    yield "## Figures"
    yield _figures(report)
    yield (
        "Means over the queries, with 95 % bootstrap intervals where the values of single queries "
        "are known. Values on a subset are higher than those on the full corpus."
    )
    yield f"![The curve of {shown_measure(report.metric.key)} over the training]({PICTURE})"
    yield "## Training"
    yield _training(report, trained_on)
    if command := report.run.seen.data.tags.get(COMMAND_LINE_TAG):
        yield f"```bash\n{without_secrets(command)}\n```"
    yield "## Licence"
    yield f"`{licence}`" if licence else "No licence was stated when this model was uploaded."


def _figures(report: RunReport) -> str:
    """A row for each measure of each validation."""
    lines = ["| validation | collection | measure | value | interval |", "|---|---|---|---|---|"]
    sizes = {curve.name: _sizes(report, curve) for curve in report.curves}
    for curve in report.curves:
        intervals = curve.intervals.get(report.best.checkpoint.step, {})
        for key, value in _row(curve, report).items():
            ends = f"{intervals[key][0]:.4f} to {intervals[key][1]:.4f}" if key in intervals else ""
            cells = (curve.name, sizes[curve.name], shown_measure(key), f"{value:.4f}", ends)
            lines.append(f"| {' | '.join(map(_text, cells))} |")
    return "\n".join(lines)


def _sizes(report: RunReport, curve: Curve) -> str:
    """The collection of a validation, its split and its sizes."""
    for name, about in run_datasets(report.run.seen, f"validation {curve.name}"):
        return f"{_short(name)}{about}"
    return _short(validation_collection(report.run, curve.name) or "")


def _training(report: RunReport, trained_on: str) -> str:
    params, info = report.run.seen.data.params, report.run.seen.info
    rows = {
        "collection": next(
            (f"{_short(n)}{about}" for n, about in run_datasets(report.run.seen, "training")),
            trained_on,
        ),
        **{name: params[name] for name in SETTINGS if name in params},
        "MLflow run": f"{report.run.name} ({info.run_id})",
        "trained with": f"mlflow_dr {VERSION}",
    }
    lines = [f"| {_text(key)} | {_text(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _text(text: str) -> str:
    """A text in a table of Markdown."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
