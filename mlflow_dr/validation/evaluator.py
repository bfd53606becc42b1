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
    from mlflow_dr.validation.evaluate_config import EvaluatorConfig
    from mlflow_dr.validation.report import Report

log = logging.getLogger(__name__)


class DenseRetrievalEvaluator(ModelEvaluator):
    """Measures the retrieval quality of a published encoder on a collection.

    `EvaluatorConfig` says what `evaluator_config` may have.
    """

    @classmethod
    def can_evaluate(
        cls, *, model_type: str | None, evaluator_config: Mapping[str, Any] | None, **_: Any
    ) -> bool:
        """Whether the model type is `dense_retriever`."""
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
            UsageError: a model, data or configuration that this evaluator does not take.
            CheckpointError: the encoder gives NaN.
            DataError: the collection's files are damaged, or no ranking can be written of its ids.
        """
        from mlflow_dr.config import within
        from mlflow_dr.validation.dataset import EvalDataset
        from mlflow_dr.validation.evaluate import evaluate
        from mlflow_dr.validation.evaluate_config import EvaluatorConfig

        if extra_metrics or custom_artifacts or predictions:
            raise UsageError(
                "the evaluator dense_retrieval takes no extra_metrics, custom_artifacts or "
                "predictions; name what to measure as evaluator_config={'measures': ...}"
            )
        with within("evaluator_config"):
            config = EvaluatorConfig(**(evaluator_config or {}))
        settings = config.eval_config()
        encoder = _encoder(model)
        judged = _judged(dataset, config)
        eval_dataset = EvalDataset(judged.collection, judged.split)
        if config.log_ranking:
            eval_dataset.check_ids()
        if not isinstance(dataset, JudgedQueries):
            log_dataset(run_id, judged)
        report = evaluate(encoder, eval_dataset, settings)
        values = {
            f"{config.metric_prefix}{measure.metric}": value
            for measure, value in report.measures.items()
        }
        if model_id is None:  # otherwise MLflow logs them
            log_evaluation_metrics(run_id, values, judged)
        return _result(run_id, values, judged, report, config)


def _encoder(model: Any) -> Encoder:
    """A copy of the model's encoder, because evaluating changes its device and number format.

    Raises:
        UsageError: the model has no encoder of this package.
    """
    from mlflow_dr.encoder.model import Encoder

    try:
        encoder = model.get_raw_model()
    except (AttributeError, NotImplementedError):
        encoder = None
    if not isinstance(encoder, Encoder):
        raise UsageError(
            f"model is a {type(model).__name__}, no encoder of mlflow_dr; expected a checkpoint "
            "that mlflow_dr has published, such as model='models:/<id>', with env_manager='local'"
        )
    return copy.deepcopy(encoder)


def _judged(data: Any, config: EvaluatorConfig) -> CollectionDataset:
    """The collection to evaluate on.

    Raises:
        UsageError: it is named twice, or not at all.
    """
    name = config.dataset
    if isinstance(data, JudgedQueries):
        if name or config.split:
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
    log.warning("data is ignored: evaluator_config names the dataset %r", name)
    return from_dense_retrieval(name, config.split)


def _result(
    run_id: str,
    values: Mapping[str, float],
    judged: CollectionDataset,
    report: Report,
    config: EvaluatorConfig,
) -> EvaluationResult:
    queries = judged.topics.queries
    measured = [report.per_query[query.id] for query in queries]
    table: dict[str, list[Any]] = {
        "query_id": [query.id for query in queries],
        "query": [query.text for query in queries],
        **{name.metric: [row[name] for row in measured] for name in report.measures},
    }
    ranking = _trec(report) if config.log_ranking else None
    return evaluation_result(run_id, values, table, config.metric_prefix, ranking)


def _trec(report: Report) -> str:
    """The ranking as the text of a TREC run file."""
    from mlflow_dr.retrieval.ranking import write_ranking

    with tempfile.TemporaryDirectory(prefix="mlflow_dr-") as directory:
        path = Path(directory) / "ranking.trec"
        write_ranking(path, [report.ranking])
        return path.read_text(encoding="utf-8")
