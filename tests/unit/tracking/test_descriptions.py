"""What MLflow's pages say about a run and its checkpoints."""

import re
from collections.abc import Callable

import pytest
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.descriptions import dated_name, describe_checkpoint, describe_run
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name


def note(run: TrackedRun) -> str:
    return run.fetch().data.tags.get(MLFLOW_RUN_NOTE, "")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("data/sea", "org/small-bert"), "sea-small-bert"),
        (("irds:beir/scifact/train", "tiny"), "train-tiny"),
        (("a/one@2+two", "models:/m-0123"), "one@2+two-m-0123"),
        (("x" * 90, "ü ü"), f"{'x' * 40}-unnamed"),
    ],
)
def test_a_name_says_collection_backbone_and_time(parts: tuple[str, ...], name: str) -> None:
    assert re.fullmatch(re.escape(name) + r"-\d{4}-\d{4}", dated_name(*parts))


def test_a_description_says_what_is_trained_and_validated(run: TrackedRun) -> None:
    run.log_params({"model": "tiny", "dataset": "sea"})
    run.log_collection("sea", "0", "sea", {"examples": 1500, "split": "train"}, "training")
    bind_name(run, "val", {"measures": "mrr@10"})
    run.log_collection("sea", "1", "sea", {"passages": 9000, "split": "dev"}, "validation val")
    run.set_tags({"best val/mrr_at_10": "0.5000 at step 3", "mlflow_dr.command_line": "mlflow-dr"})
    describe_run(run)
    text = note(run)
    assert "Trains **tiny** on **sea** (split train, 1,500 examples)." in text
    assert "Validation `val`: **sea** (split dev, 9,000 passages)." in text
    assert "Best val/mrr_at_10: **0.5000 at step 3**" in text
    assert f"](#/experiments/{run.experiment_id}/runs/{run.id}/model-metrics?" in text
    assert "```bash\nmlflow-dr\n```" in text


def test_a_description_that_somebody_has_edited_stays(run: TrackedRun) -> None:
    describe_run(run)
    run.log_params({"model": "tiny"})
    describe_run(run)
    assert "Trains **tiny**" in note(run)
    run.set_tags({MLFLOW_RUN_NOTE: "mine", "best val/mrr_at_10": "0.5"})
    describe_run(run)
    assert note(run) == "mine"


def test_a_checkpoint_says_its_figures_and_how_to_load_it(
    run: TrackedRun, measured: Callable
) -> None:
    checkpoint = measured(7, 0.25)
    describe_checkpoint(run, checkpoint.model_id)
    text = run_checkpoints(run)[0].tags[MLFLOW_RUN_NOTE]
    assert "`val`: mrr_at_10 **0.2500**, ndcg_at_10 **0.7500**\n" in text
    assert "2.0" not in text  # seconds
    assert f'encoder = load_model("models:/{checkpoint.model_id}")' in text
