"""The evaluator `dense_retrieval` of `mlflow.models.evaluate`, for checkpoints of ours.

    mlflow.models.evaluate(
        "models:/m-0123",
        mlflow.data.from_dense_retrieval("irds:vaswani"),
        model_type="dense_retriever",
        evaluators="dense_retrieval",
        evaluator_config={"measures": "mrr@10 ndcg@10"},
    )

MLflow imports this module whenever it evaluates anything, so torch waits until it is needed.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import MODEL_TYPE
from mlflow_dr.tracking.datasets import CollectionDataset, JudgedQueries, from_dense_retrieval
from mlflow_dr.tracking.evaluations import (
    EvaluationResult,
    ModelEvaluator,
    evaluation_result,
    log_dataset,
    log_evaluation_metrics,
)

if TYPE_CHECKING:
    from mlflow_dr.encoder.model import Encoder
    from mlflow_dr.validation.config import EvalConfig
    from mlflow_dr.validation.evaluate import Report

log = logging.getLogger(__name__)

KINDS: dict[str, type | tuple[type, ...]] = {
    "dataset": str,
    "split": str,
    "measures": (str, list, tuple),
    "depth": int,
    "device": str,
    "dtype": str,
    "keep_own_id": bool,
    "metric_prefix": str,
    "log_ranking": bool,
}


class DenseRetrievalEvaluator(ModelEvaluator):
    """Measures the retrieval quality of a published encoder on a collection.

    What `evaluator_config` may have, all of it optional: `measures`, `depth`, `device`, `dtype`
    and `keep_own_id` as `mlflow-dr evaluate` takes them; `metric_prefix`, put before the metrics'
    names; `log_ranking`, to keep the TREC run file; `dataset` and `split`, where `data` is not a
    dataset of `mlflow.data.from_dense_retrieval` and is then not looked at.
    """

    @classmethod
    def can_evaluate(
        cls, *, model_type: str | None, evaluator_config: Mapping[str, Any] | None, **_: Any
    ) -> bool:
        """Whether the model is said to be a `dense_retriever`, a type of our own."""
        return model_type == MODEL_TYPE

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: Any = None,
        model_id: str | None = None,
        **_: Any,
    ) -> EvaluationResult:
        """Encode the collection, search, measure; log the figures and a table of all queries.

        Raises:
            UsageError: a model, data or configuration that is none for this evaluator.
            CheckpointError: the encoder gives NaN.
            DataError: the collection's files are damaged, or its ids are such that no ranking can
                be written.
        """
        from mlflow_dr.validation.dataset import EvalDataset
        from mlflow_dr.validation.evaluate import evaluate

        if extra_metrics or custom_artifacts or predictions:
            raise UsageError(
                "the evaluator dense_retrieval takes no extra_metrics, custom_artifacts or "
                "predictions; name what to measure as evaluator_config={'measures': ...}"
            )
        config = _checked(evaluator_config or {})
        settings = _settings(config)
        encoder = _encoder(model)
        judged = _judged(dataset, config)
        eval_dataset = EvalDataset(judged.collection, judged.split)
        if config.get("log_ranking"):
            eval_dataset.check_ids()
        if not isinstance(dataset, JudgedQueries):
            log_dataset(run_id, judged)
        report = evaluate(encoder, eval_dataset, settings)
        prefix = config.get("metric_prefix", "")
        values = {f"{prefix}{one.metric}": value for one, value in report.measures.items()}
        if model_id is None:  # MLflow itself logs those of a model that it knows by its id
            log_evaluation_metrics(run_id, values, judged)
        return _result(run_id, values, judged, report, config)


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, where each key is known and each value of its type.

    Raises:
        UsageError: the first that is not.
    """
    for key, value in config.items():
        if key not in KINDS:
            raise UsageError(f"evaluator_config: no key {key!r}; known are {', '.join(KINDS)}")
        kind = KINDS[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"evaluator_config: {key} is {value!r}; expected {_said(kind)}")
    return config


def _said(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds)


def _settings(config: Mapping[str, Any]) -> EvalConfig:
    from mlflow_dr.retrieval.measures import DEFAULT_MEASURES, check_depth, parse_measures
    from mlflow_dr.validation.config import EvalConfig

    asked = config.get("measures", DEFAULT_MEASURES)
    measures = parse_measures(asked if isinstance(asked, str) else " ".join(map(str, asked)))
    depth = check_depth(measures, config.get("depth"))
    others = {key: config[key] for key in ("device", "dtype", "keep_own_id") if key in config}
    return EvalConfig(measures, depth, **others)


def _encoder(model: Any) -> Encoder:
    """A copy of the model's encoder, because evaluating changes its device and number format.

    Raises:
        UsageError: the model is none of ours.
    """
    from mlflow_dr.encoder.model import Encoder

    try:
        encoder = model.get_raw_model()
    except (AttributeError, NotImplementedError):
        encoder = None
    if not isinstance(encoder, Encoder):
        raise UsageError(
            f"model is a {type(model).__name__} without an encoder of ours; expected a checkpoint "
            "that mlflow_dr has published, such as model='models:/<id>', with env_manager='local'"
        )
    return copy.deepcopy(encoder)


def _judged(data: Any, config: Mapping[str, Any]) -> CollectionDataset:
    """The collection that is meant.

    Raises:
        UsageError: it is named twice, or not at all.
    """
    name = config.get("dataset")
    if isinstance(data, JudgedQueries):
        if name or "split" in config:
            raise UsageError(
                f"data is {data.origin.name}/{data.origin.split} already; leave dataset and split "
                "out of evaluator_config"
            )
        return data.origin
    if not name:
        raise UsageError(
            "data is no collection; give data=mlflow.data.from_dense_retrieval(NAME, split=...), "
            "or evaluator_config={'dataset': NAME}"
        )
    log.warning("data is not looked at: evaluator_config names the dataset %r", name)
    return from_dense_retrieval(name, config.get("split"))


def _result(
    run_id: str,
    values: Mapping[str, float],
    judged: CollectionDataset,
    report: Report,
    config: Mapping[str, Any],
) -> EvaluationResult:
    queries = judged.topics.queries
    measured = [report.per_query[query.id] for query in queries]
    table: dict[str, list[Any]] = {
        "query_id": [query.id for query in queries],
        "query": [query.text for query in queries],
        **{name.replace("@", "_at_"): [one[name] for one in measured] for name in report.measures},
    }
    ranking = _trec(report) if config.get("log_ranking") else None
    return evaluation_result(run_id, values, table, config.get("metric_prefix", ""), ranking)


def _trec(report: Report) -> str:
    """The ranking as the text of a TREC run file."""
    from mlflow_dr.retrieval.ranking import write_ranking

    with tempfile.TemporaryDirectory(prefix="mlflow_dr-") as room:
        path = Path(room) / "ranking.trec"
        write_ranking(path, report.ranking)
        return path.read_text(encoding="utf-8")
