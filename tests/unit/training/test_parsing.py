"""Flags, their other names, files of flags, and what is refused."""

from dataclasses import fields
from pathlib import Path

import pytest

from mlflow_dr import devices
from mlflow_dr.errors import UsageError
from mlflow_dr.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
)
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.parsing import parse_training, training_parser


def test_dashes_and_underscores_are_the_same() -> None:
    dashed = parse_training(["--learning-rate", "1e-4", "--publish-steps=7"])
    underscored = parse_training(["--learning_rate", "1e-4", "--publish_steps=7"])
    assert dashed.trainer.learning_rate == underscored.trainer.learning_rate == 1e-4
    assert dashed.publish.publish_steps == underscored.publish.publish_steps == 7


def test_file_and_flags_override_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text("learning_rate: 1e-4\nq-max-len: 48\ndataset: demo\n")
    request = parse_training(["--config", str(file), "--q_max_len", "20"])
    assert request.data.q_max_len == 20
    assert request.trainer.learning_rate == 1e-4
    assert request.loss.temperature == 0.05  # the recipe of demo


def test_a_file_may_have_empty_values_and_mappings(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        "tokenizer_name: null\nlearning_rate:\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.1}\naccelerator_config:\n  split_batches: true\n"
    )
    request = parse_training(["--config", str(file)])
    default = parse_training([])
    assert request.model.tokenizer_name is None
    assert request.trainer.learning_rate == default.trainer.learning_rate
    assert request.trainer.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert request.trainer.accelerator_config.split_batches is True


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


@pytest.mark.parametrize("flag", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_an_empty_batch_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} is 0; it must be at least 1"):
        parse_training([f"--{flag}", "0"])


def test_yaml_may_have_the_word_no_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("save_strategy: no\nreport_to: [wandb, tensorboard]\nnormalize: no\n")
    request = parse_training(["--config", str(file)])
    assert request.trainer.save_strategy == "no"
    assert request.trainer.report_to == ["wandb", "tensorboard"]
    assert request.model.normalize is False
    flags = ["--report_to", "wandb", "tensorboard", "--max_steps", "3"]
    assert parse_training(flags).trainer.report_to == ["wandb", "tensorboard"]
    assert parse_training([]).trainer.report_to == []


@pytest.mark.parametrize("text", ["[" * 9999, f"seed: {'9' * 5000}", "a: b: c"], ids=len)
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"train\.yaml: not YAML or JSON"):
        parse_training(["--config", str(file)])


def test_a_list_of_lists_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("query_prefix: [[a]]\n")
    with pytest.raises(UsageError, match=r"train\.yaml: --query_prefix: expected a value"):
        parse_training(["--config", str(file)])


@pytest.mark.parametrize("name", ["dataset_name", "output_dir"])
def test_a_mapping_instead_of_a_value_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(f"{name}: {{a: 1}}\n")
    with pytest.raises(UsageError, match=rf"train\.yaml: --{name}: expected a value, not a map"):
        parse_training(["--config", str(file)])


def test_fp16_replaces_bf16_only_if_it_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_is_bf16_faster", lambda device: True)
    file = tmp_path / "train.yaml"
    file.write_text("fp16: false\n")
    assert parse_training(["--use_cpu", "--config", str(file)]).trainer.bf16
    assert parse_training(["--use_cpu", "--fp16", "false"]).trainer.bf16
    with pytest.raises(UsageError, match="--fp16 needs a GPU"):
        parse_training(["--use_cpu", "--fp16"])


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
        (["stray"], "unknown argument stray"),
        (["--distil_weight", "1.5"], r"distil_weight is 1\.5; it must be from 0 to 1"),
        (["--distil_temperature", "0"], r"distil_temperature is 0\.0"),
        (["--gc_q_chunk_size", "0"], "gc_q_chunk_size is 0"),
        (["--ctx_chunk_size", "-3"], "gc_p_chunk_size is -3"),
        (["--dataset_proc_num", "0"], "dataset_proc_num is 0"),
        (["--lora_r", "0"], "lora_r is 0"),
        (["--lora_publish", "both"], "lora_publish is 'both'; expected merged or adapter"),
        (["--projection_out_dim", "0"], "projection_out_dim is 0"),
        (["--save_strategy", "often"], "often"),
        (["--do_train", "false"], "--do_train false leaves nothing to do"),
        (["--do_train=no"], "--do_train false leaves nothing to do"),
        (["--do_eval"], "mlflow-dr validate --run-id RUN"),
        (["--do_predict"], "mlflow-dr validate --run-id RUN"),
        (["--fp16", "--use_cpu"], "--fp16 needs a GPU; on a CPU use --bf16"),
        (["--grad_cache", "--fsdp", "full_shard"], "--grad_cache cannot be used with --fsdp"),
    ],
)
def test_an_error_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_training(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean"),
        ("- a\n- b", "expected a mapping of flags to values, got list"),
        ("a: [", "not YAML or JSON"),
        ("config: other.yaml", "unknown flag"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        parse_training(["--config", str(file)])
    assert str(file) in str(caught.value)


ALIASES = {
    "--model": ("model", "model_name_or_path", "some/where"),
    "--dataset": ("data", "dataset_name", "some/where"),
    "--q_chunk_size": ("loss", "gc_q_chunk_size", 7),
    "--ctx_chunk_size": ("loss", "gc_p_chunk_size", 7),
    "--train_group_size": ("data", "train_n_passages", 7),
    "--query_max_len": ("data", "q_max_len", 7),
    "--passage_max_len": ("data", "p_max_len", 7),
    "--num_proc": ("data", "dataset_proc_num", 7),
    "--warmup_ratio": ("trainer", "warmup_steps", 0.25),
}


@pytest.mark.parametrize("dashed", [False, True])
@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_other_trainers_are_taken(alias: str, dashed: bool) -> None:
    """Tevatron's, GC-DPR's and Hugging Face's own before they were renamed."""
    part, name, value = ALIASES[alias]
    arg = "--" + alias[2:].replace("_", "-") if dashed else alias
    request = parse_training([arg, str(value)])
    assert getattr(getattr(request, part), name) == value


@pytest.mark.parametrize(
    "arg",
    [
        "--negatives_x_device",
        "--negatives-x-device",
        "--negative_x_device",
        "--negative-x-device",
    ],
)
def test_negatives_across_devices_of_one_process_log_a_warning(
    arg: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = parse_training([arg])
    assert request.loss.objective().across_devices
    assert "has no effect: there is one training process" in caplog.text
    caplog.clear()
    assert not parse_training([]).loss.objective().across_devices
    assert caplog.text == ""


def test_the_defaults_of_tevatron() -> None:
    """Of training files, as its documentation lists them."""
    request = parse_training(["--dataset", "files.jsonl"])
    assert request.model.model_name_or_path == "bert-base-uncased"
    assert (request.data.q_max_len, request.data.p_max_len) == (32, 128)
    assert request.data.train_n_passages == 8
    assert request.data.passage_field_separator == " "
    assert request.data.dataset_proc_num == 12
    assert request.model.projection_out_dim == 768
    assert not request.model.untie_encoder
    assert not request.model.add_pooler
    assert request.loss.chunk_sizes() is None
    assert not request.loss.negatives_x_device
    assert (request.loss.temperature, request.bare_pooling) == (1.0, "cls")


def test_flags_of_the_loss_make_the_objective() -> None:
    argv = "--temperature 0.5 --mask_duplicates false --distil_weight 0.25 --distil_temperature 3"
    objective = parse_training(argv.split()).loss.objective()
    assert objective == Objective(
        temperature=0.5, mask_duplicates=False, distil_weight=0.25, distil_temperature=3.0
    )
    assert parse_training([]).loss.objective() == Objective(
        temperature=0.05, distil_temperature=0.02
    )


def test_flags_of_the_gradient_cache_make_chunks() -> None:
    assert parse_training(["--gc_q_chunk_size", "2"]).loss.chunk_sizes() is None
    assert parse_training(["--grad_cache"]).loss.chunk_sizes() == {"query": 4, "passage": 32}
    sizes = parse_training(["--grad_cache", "--gc_q_chunk_size", "2", "--gc-p-chunk-size", "999"])
    assert sizes.loss.chunk_sizes() == {"query": 2, "passage": 999}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "true"], "true"),
        (["--resume-from-checkpoint", "out/checkpoint-5"], "out/checkpoint-5"),
    ],
)
def test_resume_from_checkpoint_takes_a_value_or_none(
    argv: list[str], expected: str | None
) -> None:
    assert parse_training([*argv, "--max_steps", "3"]).trainer.resume_from_checkpoint == expected


def test_do_train_is_taken() -> None:
    assert parse_training(["--do_train"]).trainer.do_train
    assert parse_training(["--do_train", "--learning_rate", "1e-4"]).trainer.do_train


def test_lora_name_or_path_implies_lora() -> None:
    assert not parse_training([]).model.lora
    assert parse_training(["--lora_name_or_path", "some/where"]).model.lora


def test_every_flag_is_in_the_help_with_an_explanation() -> None:
    text = training_parser().format_help()
    for kind in (ModelArguments, LossArguments, DataArguments, PublishArguments):
        for field in fields(kind):
            assert f"--{field.name}" in text
            assert field.metadata["help"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor does not fit a retriever"),
        ("--neftune_noise_alpha 5", "--neftune_noise_alpha does not fit a retriever"),
        ("--train_sampling_strategy group_by_length", "group_by_length does not fit a retriever"),
        ("--debug underflow_overflow", "--debug does not fit a retriever"),
        ("--push_to_hub", "`mlflow-dr best --push OWNER/NAME` uploads the best"),
        ("--eval_on_start", "training does not evaluate"),
    ],
)
def test_flags_of_other_trainings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_training(["--dataset", "demo", "--model", "tiny", "--use_cpu", *flags.split()])
