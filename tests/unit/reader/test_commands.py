import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from mlflow import MlflowClient

from mlflow_dr.cli import group


def run(*argv: object) -> str:
    result = CliRunner().invoke(group, [*map(str, argv)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_reader_goes_from_results_to_predictions(
    write_results: Callable[..., Path],
    make_reader: Callable[[], Any],
    tokenizer: Any,
    tmp_path: Path,
    client: MlflowClient,
) -> None:
    results = write_results()
    model, reader = tmp_path / "model", tmp_path / "reader"
    make_reader().backbone.save_pretrained(model)
    tokenizer.save_pretrained(model)
    prepared = run("reader-data", "--retriever_results", results, "--model", model)
    assert prepared.endswith("2 questions, 5 passages\n")
    trained = run(
        *("reader-train", "--train_file", results, "--pretrained_model_cfg", model),
        *("--output_dir", reader, "--sequence_length", 64, "--max_steps", 1, "--device", "cpu"),
        *("--batch_size", 1, "--passages_per_question", 2),
        *("--tracking_uri", client.tracking_uri),
    )
    assert "1 steps, 1 questions, mean loss" in trained
    predictions = tmp_path / "predictions.json"
    predicted = run(
        *("reader-predict", reader, "--dev_file", results, "--sequence_length", 64),
        *("--eval_top_docs", 1, 5, "--prediction_results_file", predictions, "--device", "cpu"),
    )
    assert [line.split("\t")[0] for line in predicted.splitlines() if "\t" in line] == [
        *("em@1", "f1@1", "em_decoded@1", "em@5", "f1@5", "em_decoded@5")
    ]
    assert len(json.loads(predictions.read_text())) == 2
