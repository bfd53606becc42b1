from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.parsing import parse_training


def test_dashes_and_underscores_are_the_same() -> None:
    one = parse_training(["--learning-rate", "1e-4", "--publish-steps=7"])
    other = parse_training(["--learning_rate", "1e-4", "--publish_steps=7"])
    assert one.trainer.learning_rate == other.trainer.learning_rate == 1e-4
    assert one.publish.publish_steps == other.publish.publish_steps == 7


def test_the_recipe_stands_behind_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text("learning_rate: 1e-4\nq-max-len: 48\ndataset: demo\n")
    request = parse_training(["--config", str(file), "--q_max_len", "20"])
    assert request.data.q_max_len == 20
    assert request.trainer.learning_rate == 1e-4
    assert request.model.temperature == 0.05  # the recipe of demo


def test_json_is_taken_too(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    file.write_text('{"normalize": false, "max_steps": 3}')
    request = parse_training(["--config", str(file)])
    assert request.model.normalize is False
    assert request.trainer.max_steps == 3


def test_model_and_dataset_are_short_names() -> None:
    request = parse_training(["--model", "bert-base-uncased", "--dataset", "msmarco"])
    assert request.model.model_name_or_path == "bert-base-uncased"
    assert request.data.dataset_name == "msmarco"
    assert request.data.train_n_passages == 8


def test_save_steps_alone_means_saving() -> None:
    assert parse_training([]).trainer.save_strategy == "no"
    assert parse_training(["--save_steps", "5"]).trainer.save_strategy == "steps"


def test_epochs_replace_the_recipes_steps() -> None:
    request = parse_training(["--num_train_epochs", "2"])
    assert request.trainer.max_steps == -1
    assert request.trainer.num_train_epochs == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--train_n_passages", "0"], "train_n_passages is 0"),
        (["--publish_steps", "-1"], "publish_steps is -1"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: cannot be read"),
        (["stray"], "no flag stray"),
        (["--resume_from_checkpoint", "outputs/checkpoint-5"], "cannot be resumed so far"),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_training(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean"),
        ("- a\n- b", "expected flags and values, got list"),
        ("a: [", "not YAML or JSON"),
        ("config: other.yaml", "no flag"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        parse_training(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_several_training_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train alone, on all examples, and publish to a run of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 training processes"):
        parse_training([])
