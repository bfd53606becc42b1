"""GC-DPR's own command line, DPR's recipe, and what they make of data and encoder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.data import open_data, validated_dataset
from mlflow_dr.training.encoder_setup import build_encoder, collator_of, mixed_training_set
from mlflow_dr.training.gc_dpr import ACCEPTED_ONLY
from mlflow_dr.training.parsing import parse_training

PROGRAMS_FLAGS = """
    --pretrained_model_cfg tiny --encoder_model_type hf_bert --pretrained_file x
    --projection_dim 16 --sequence_length 64 --no_cuda --local_rank -1 --fp16_opt_level O1
    --train_file {directory}/nq-train-*.json --dev_file {directory}/nq-dev.json
    --batch_size 4 --dev_batch_size 16 --seed 12345 --adam_eps 1e-7 --adam_betas (0.8,0.99)
    --max_grad_norm 3.0 --log_batch_step 7 --train_rolling_loss_step 9 --weight_decay 0.1
    --learning_rate 3e-05 --warmup_steps 12 --dropout 0.2 --gradient_accumulation_steps 2
    --num_train_epochs 5 --grad_cache --q_chunk_size 3 --ctx_chunk_size 5 --do_lower_case
    --eval_per_epoch 2 --global_loss_buf_sz 2097152 --fix_ctx_encoder --shuffle_positive_ctx
    --output_dir out --hard_negatives 2 --other_negatives 0 --train_files_upsample_rates [1,2]
    --checkpoint_file_name mine
"""


def record(name: str) -> Any:
    def passage(text: str) -> dict[str, str]:
        return {"title": f"Title {text}", "text": f"{text} is in here", "psg_id": text}

    return {
        "question": f"what is {name}?",
        "answers": [name],
        "positive_ctxs": [passage(f"{name}a"), passage(f"{name}b")],
        "negative_ctxs": [passage(f"{name}n")],
        "hard_negative_ctxs": [passage(f"{name}h"), passage(f"{name}i")],
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two training files with 6 and 3 questions, and one validation file."""
    for file, names in (("train-1", "abcdef"), ("train-2", "uvw"), ("dev", "xyz")):
        text = json.dumps([record(name * 3) for name in names])
        (tmp_path / f"nq-{file}.json").write_text(text)
    return tmp_path


def built(argv: Sequence[str]) -> tuple[TrainingRequest, Any, Encoder]:
    request = parse_training(argv)
    data = open_data(request.data)
    return request, data, build_encoder(request, data, request.model.model_name_or_path)


def test_all_flags_of_the_program(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = parse_training(PROGRAMS_FLAGS.format(directory=directory).split())
    model, data, trainer = request.model, request.data, request.trainer
    assert (model.model_name_or_path, model.dropout) == ("tiny", 0.2)
    assert (model.add_pooler, model.projection_out_dim) == (True, 16)
    assert (model.do_lower_case, model.fix_ctx_encoder) == (True, True)
    assert data.dataset_name == f"{directory}/nq-train-1.json+{directory}/nq-train-2.json"
    assert data.validation_dataset == f"pool:{directory}/nq-dev.json"
    assert (data.q_max_len, data.p_max_len, data.train_n_passages) == (64, 64, 3)
    assert not data.positive_passage_no_shuffle
    assert (trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps) == (4, 2)
    assert (trainer.adam_beta1, trainer.adam_beta2, trainer.adam_epsilon) == (0.8, 0.99, 1e-7)
    assert (trainer.learning_rate, trainer.weight_decay, trainer.max_grad_norm) == (3e-5, 0.1, 3.0)
    assert (trainer.warmup_steps, trainer.num_train_epochs, trainer.max_steps) == (12, 5, -1)
    assert (trainer.seed, trainer.logging_steps, trainer.output_dir) == (12345, 7, "out")
    assert trainer.use_cpu
    assert request.loss.chunk_sizes() == {"query": 3, "passage": 5}
    assert request.publish.publish_per_epoch == 2
    messages = [
        line.getMessage() for line in caplog.records if "without effect" in line.getMessage()
    ]
    assert len(messages) == 1
    assert all(f"--{name}" in messages[0] for name in ACCEPTED_ONLY)


def test_flags_override_the_recipe_of_dpr(directory: Path) -> None:
    request = parse_training(["--train_file", f"{directory}/nq-train-1.json"])
    trainer = request.trainer
    assert request.encoder_changes() == {
        "pooling": "cls",
        "normalize": False,
        "query_max_length": 256,
        "passage_max_length": 256,
        "title_separator": " [SEP] ",
        "strip_question_mark": True,
    }
    assert request.model.untie_encoder
    assert request.data.positive_passage_no_shuffle
    assert request.data.train_n_passages == 2
    assert request.loss.temperature == 1.0
    assert (trainer.learning_rate, trainer.per_device_train_batch_size) == (1e-5, 2)
    assert (trainer.num_train_epochs, trainer.warmup_steps, trainer.seed) == (3, 100, 0)
    assert not request.loss.grad_cache
    assert request.publish.publish_per_epoch == 1


def test_the_recipe_by_name() -> None:
    request = parse_training(["--recipe", "dpr", "--dataset", "some.json", "--q_max_len", "32"])
    assert (request.data.q_max_len, request.data.p_max_len) == (32, 256)
    assert request.model.untie_encoder
    assert (request.trainer.learning_rate, request.trainer.warmup_steps) == (2e-5, 1237)
    assert request.loss.chunk_sizes() == {"query": 16, "passage": 8}
    other = parse_training(["--recipe", "judged", "--dataset", "some.json"])
    assert (other.data.train_n_passages, other.loss.temperature) == (1, 0.05)


def test_a_renamed_flag_alone_does_not_select_the_recipe() -> None:
    request = parse_training(["--batch_size", "4", "--hard_negatives", "3"])
    assert not request.model.untie_encoder
    assert request.data.train_n_passages == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--val_av_rank_start_epoch 30 --val_av_rank_max_qs 9", "--val_av_rank_start_epoch, --val"),
        (
            "--train_file {directory}/none-*.json",
            "--train_file: no file matches '{directory}/none-*.json'",
        ),
        (
            "--train_file {file},{directory}/none.json",
            "--train_file: no file matches '{directory}/none.json'",
        ),
        ("--train_file {file} --dev_file {directory}/*.json", "matches 3 files; name one"),
        ("--train_file {file} --dataset demo", "--train_file and --dataset set the same value"),
        ("--train_file {file} --hard_negatives 1 --train_group_size 2", "--train_group_size set"),
        ("--train_file {file} --encoder_model_type pytext_bert", "pytext_bert is not supported"),
        ("--train_file {file} --encoder_model_type bert", "expected hf_bert, pytext_bert or"),
        ("--train_file {file} --other_negatives -2", "other_negatives is -2; it must be"),
        ("--train_file {file} --adam_betas 0.9", "--adam_betas is '0.9'; expected two numbers"),
        ("--train_file {file} --adam_betas nine", "--adam_betas is 'nine'; expected numbers"),
        ("--dev_file {file}", "--dev_file needs --train_file"),
    ],
)
def test_contradictions_are_refused_by_name(directory: Path, argv: str, message: str) -> None:
    names = {"directory": directory, "file": directory / "nq-train-1.json"}
    with pytest.raises(UsageError) as caught:
        parse_training(argv.format(**names).split())
    assert message.format(**names) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_by_pattern_or_commas(directory: Path) -> None:
    first, second = (f"{directory}/nq-train-{number}.json" for number in (1, 2))
    for pattern, expected in (
        (f"{directory}/nq-train-?.json", f"{first}+{second}"),
        (f"{second},{first}", f"{second}+{first}"),
        (second, second),
    ):
        assert parse_training(["--train_file", pattern]).data.dataset_name == expected


def test_upsample_rates_of_files(directory: Path) -> None:
    argv = ["--train_file", f"{directory}/nq-train-*.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--q_max_len", "16", "--p_max_len", "32", "--use_cpu"]
    assert len(mixed_training_set(*built(argv))) == 9
    upsampled = mixed_training_set(*built([*argv, "--train_files_upsample_rates", "[1,4]"]))
    queries = [upsampled[index].query.tolist() for index in range(len(upsampled))]
    counts = sorted(queries.count(list(query)) for query in set(map(tuple, queries)))
    assert counts == [1] * 6 + [4] * 3
    with pytest.raises(UsageError, match=r"has 3 rates, but .* has 2 datasets"):
        built([*argv, "--train_files_upsample_rates", "[1,2,3]"])


def test_a_rate_of_one_file(directory: Path) -> None:
    argv = ["--train_file", f"{directory}/nq-train-2.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--train_files_upsample_rates", "[2]", "--use_cpu", "--sequence_length", "32"]
    assert len(mixed_training_set(*built(argv))) == 6


def test_the_positive_is_the_first_unless_they_are_shuffled(directory: Path) -> None:
    argv = ["--train_file", f"{directory}/nq-train-2.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--sequence_length", "32", "--use_cpu"]

    def positives(more: Sequence[str]) -> set[tuple[int, ...]]:
        training_set = mixed_training_set(*built([*argv, *more]))
        return {tuple(training_set.groups([(0, visit)])[0].passages[0]) for visit in range(4)}

    assert len(positives([])) == 1
    assert len(positives(["--shuffle_positive_ctx"])) == 2


def test_other_negatives_are_the_files_negative_ctxs(directory: Path) -> None:
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--sequence_length", "32", "--use_cpu", "--hard_negatives", "2"]
    for count in (0, 1, 2):
        request, data, encoder = built([*argv, "--other_negatives", str(count)])
        training_set = mixed_training_set(request, data, encoder)
        for index, name in enumerate("abcdef"):
            texts = [encoder.tokenizer.decode(ids) for ids in training_set[index].passages]
            found = [text.split("[SEP]")[1].split()[0] for text in texts]
            assert found[0] == f"{name * 3}a"
            assert set(found[1:3]) == {f"{name * 3}h", f"{name * 3}i"}
            assert found[3:] == [f"{name * 3}n"] * count
    batch = collator_of(encoder)([training_set[index] for index in range(3)])
    assert len(batch["passage"]["input_ids"]) == len(batch["keys"]) == 15


def test_other_negatives_of_data_without_them_are_refused(directory: Path, tmp_path: Path) -> None:
    passage = {"docid": "d", "title": "", "text": "all about it"}
    more = {"positive_passages": [passage], "negative_passages": [{**passage, "docid": "e"}]}
    (tmp_path / "tevatron.jsonl").write_text(json.dumps({"query_id": "1", "query": "it"} | more))
    for name in (str(tmp_path / "tevatron.jsonl"), "irds:vaswani"):
        argv = ["--dataset", name, "--validation_dataset", f"pool:{directory}/nq-dev.json"]
        request = parse_training([*argv, "--other_negatives", "1", "--use_cpu"])
        with pytest.raises(UsageError, match=r"negatives.*--other_negatives"):
            open_data(request.data)


def test_the_development_file_is_validated_on(directory: Path) -> None:
    argv = [
        "--train_file",
        f"{directory}/nq-train-1.json",
        "--dev_file",
        f"{directory}/nq-dev.json",
    ]
    collection = open_collection(validated_dataset(parse_training(argv).data))
    assert len(collection.topics("dev").queries) == 3
    assert len(collection.corpus()) == 12


def test_tokens_are_those_of_dpr_and_saved_in_the_checkpoint(
    directory: Path, tmp_path: Path
) -> None:
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--pretrained_model_cfg", "tiny"]
    _, _, encoder = built([*argv, "--sequence_length", "32", "--use_cpu"])
    save_encoder(tmp_path / "saved", encoder)
    for loaded in (encoder, load_encoder(tmp_path / "saved")):
        tokenizer = loaded.tokenizer
        queries = TextTokenizer.of(loaded.query_encoder)
        passages = TextTokenizer(tokenizer, loaded.settings)
        asked = [Query("1", text) for text in ("what is aaa?", "what is aaa??", "what is aaa? ")]
        expected = ["what is aaa", "what is aaa?", "what is aaa?"]
        assert queries.query_ids(asked) == [tokenizer(text)["input_ids"] for text in expected]
        pair = tokenizer("Title a", "aaa is in here")["input_ids"]
        assert passages.passage_ids([Passage("1", "Title a", "aaa is in here")]) == [pair]
        alone = tokenizer("aaa is in here")["input_ids"]
        assert passages.passage_ids([Passage("1", "", "aaa is in here")]) == [alone]


def test_berts_separator_needs_a_tokenizer_that_has_it(
    directory: Path, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    tiny = make_tiny()
    backend = json.loads(tiny.tokenizer.backend_tokenizer.to_str().replace("[SEP]", "</s>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]", sep_token="</s>"
    )
    save_encoder(tmp_path / "other", Encoder(tiny.backbone, tokenizer, tiny.settings))
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--model", str(tmp_path / "other")]
    argv += ["--sequence_length", "32", "--use_cpu"]
    with pytest.raises(
        UsageError, match=r"does not know \[SEP\], .* --passage_field_separator '</s>'"
    ):
        built(argv)
    built([*argv, "--passage_field_separator", "</s>"])


@pytest.mark.parametrize("more", ["", "--grad_cache --q_chunk_size 1 --ctx_chunk_size 1"])
def test_a_frozen_passage_encoder_does_not_change(
    directory: Path, make_trainer: Any, more: str
) -> None:
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--sequence_length", "32", "--fix_ctx_encoder", "--use_cpu", *more.split()]
    request, data, encoder = built(argv)
    queries = encoder.query_encoder
    before = [[w.clone() for w in model.backbone.parameters()] for model in (encoder, queries)]
    trainer = make_trainer(
        encoder,
        training_set=mixed_training_set(request, data, encoder),
        objective=request.loss.objective(),
        chunk_sizes=request.loss.chunk_sizes(),
        max_steps=2,
    )
    trainer.data_collator = collator_of(encoder)
    trainer.train()
    same = [
        all(map(torch.equal, old, new.backbone.parameters()))
        for old, new in zip(before, (encoder, queries), strict=True)
    ]
    assert same == [True, False]
    with pytest.raises(UsageError, match="--fix_ctx_encoder needs separate encoders"):
        built([*argv, "--untie_encoder", "false"])


def test_dropout_is_set_in_the_backbone(directory: Path) -> None:
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--pretrained_model_cfg", "tiny"]
    argv += ["--sequence_length", "32", "--use_cpu"]
    for value in (0.0, 0.25):
        _, _, encoder = built([*argv, "--dropout", str(value)])
        for part in encoder.distinct_encoders:
            config = part.backbone.config
            assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == value
            dropouts = [m for m in part.backbone.modules() if isinstance(m, torch.nn.Dropout)]
            assert {module.p for module in dropouts} == {value}


def test_lower_case_with_a_tokenizer_that_keeps_case(
    directory: Path, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    tiny = make_tiny()
    backend = json.loads(tiny.tokenizer.backend_tokenizer.to_str())
    backend["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]", sep_token="[SEP]"
    )
    save_encoder(tmp_path / "cased", Encoder(tiny.backbone, tokenizer, tiny.settings))
    argv = ["--train_file", f"{directory}/nq-train-1.json", "--sequence_length", "32", "--use_cpu"]
    _, _, encoder = built([*argv, "--model", str(tmp_path / "cased"), "--do_lower_case"])
    assert encoder.settings.lowercase
    assert encoder.query_encoder.settings.lowercase
    ids = TextTokenizer.of(encoder).passage_ids(
        [Passage("1", "The Lighthouse", "Counts THE ships")]
    )
    expected = encoder.tokenizer("the lighthouse [SEP] counts the ships")["input_ids"]
    assert ids == [expected]
    assert expected.count(encoder.tokenizer.sep_token_id) == 2
    _, _, plain = built([*argv, "--model", "tiny", "--do_lower_case"])
    assert not plain.settings.lowercase  # its tokenizer does it
