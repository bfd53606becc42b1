"""Average rank and NLL of an encoder on a file of training examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.decisions.stop import plateau
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate, evaluate_all, evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig


@pytest.fixture
def file(tmp_path: Path, texts: list[str]) -> Path:
    """Six questions; the fourth repeats the first, and all share a negative."""

    def passage(text: str, name: str = "") -> dict[str, str]:
        return {"title": "Sea", "text": text, "passage_id": name or text[:9].strip()}

    records = [
        {
            "question": texts[n % 3],
            "answers": [],
            "positive_ctxs": [passage(texts[n]), passage(texts[9])],
            "hard_negative_ctxs": [passage(texts[(n + 1) % 6], "copy"), passage(f"hard {n}")],
            "negative_ctxs": [passage(texts[8])],
        }
        for n in range(6)
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([*records, {**records[0], "positive_ctxs": []}]))
    return path


def settings(measures: str, **others: Any) -> EvalConfig:
    return EvalConfig(parse_measures(measures), device="cpu", dtype="fp32", **others)


def test_a_pool_has_each_text_once_and_each_question_has_a_rank(
    file: Path, make_tiny: Callable[..., Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    data = EvalDataset(open_collection(f"pool:{file}"), "dev")
    pool = data.rank_pool
    assert "left out: 1 examples" in caplog.text
    assert len(pool.corpus) == 13  # six positives, six negatives of their own, one of all
    assert len(pool.rows(1)) == 7
    encoder = make_tiny(pooling="mean")
    report, judged = evaluate_all(
        encoder,
        [(data, settings("average_rank@1 average_rank@30 nll@4")), (data, settings("mrr@10"))],
    )
    assert list(judged.measures) == ["mrr@10"]
    assert (len(report.per_query), report.passages, report.dtype) == (6, 13, "fp32")
    tokenizer = TextTokenizer.of(encoder)
    passages = pool.corpus.passages(range(13))
    queries, vectors = (
        encode_all(encoder, token_table(ids), tokenizer.pad_id).numpy()
        for ids in (tokenizer.query_ids(pool.queries), tokenizer.passage_ids(passages))
    )
    for query, vector, own in zip(pool.queries, queries, pool.positives, strict=True):
        scores = vectors @ vector
        above = sum(scores > scores[own] + 1e-5)
        assert abs(report.per_query[query.id]["average_rank@30"] - above) <= 1
    mean = np.mean([values["nll@4"] for values in report.per_query.values()])
    assert report.measures["nll@4"] == pytest.approx(mean)
    assert report.measures["average_rank@1"] <= report.measures["average_rank@30"]


def evaluated(file: str, measures: str, subset: str = "") -> Report:
    data = EvalDataset(open_collection(file), "dev")
    if subset:
        data = data.on_subset(parse_subset(subset), settings(measures))
    data.check_measures(settings(measures))
    return evaluate(None, data, settings(measures))  # type: ignore[arg-type]


def test_other_collections_subsets_and_mixed_measures_are_refused(
    file: Path, beir_folder: Callable[..., Path]
) -> None:
    folder = beir_folder({"p": "t"}, {"q": "t"}, dev={"q": {"p": 1}})
    with pytest.raises(UsageError, match=r"name the file as pool:FILE, without a subset"):
        evaluated(str(folder), "average_rank@30")
    with pytest.raises(UsageError, match=r"name the file as pool:FILE, without a subset"):
        evaluated(f"pool:{file}", "average_rank@30", "random:2")
    with pytest.raises(UsageError, match="measure them in a validation of their own"):
        evaluated(f"pool:{file}", "average_rank@30 mrr@10")


def test_a_pool_has_no_ranking(file: Path, tmp_path: Path) -> None:
    values = {"encoder": "none", "dataset": f"pool:{file}", "measures": "average_rank@30"}
    with pytest.raises(UsageError, match="measures of a pool have no ranking"):
        evaluate_encoder(EvaluateConfig(**values, ranking=tmp_path / "x.trec"))


def test_a_rank_that_does_not_fall_is_a_plateau() -> None:
    points = [(1, -9.0), (2, -5.0), (3, -6.0), (4, -7.0)]
    reason = plateau(points, 2, metric="val/average_rank_at_30", sign=-1)
    assert reason is not None
    assert "has not fallen for 2 checkpoints: best 5.0000 at step 2, last 7.0000" in reason
