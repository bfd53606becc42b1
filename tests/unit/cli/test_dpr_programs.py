"""Command lines of GC-DPR's programs become ours, and these parse."""

import shlex
from pathlib import Path

import pytest
from recipes import check_ours

from mlflow_dr.cli import dpr_programs
from mlflow_dr.cli.dpr_programs import commands_for, dpr_command
from mlflow_dr.cli.train import train_command
from mlflow_dr.errors import UsageError

LINES = [
    "train_dense_encoder --train_file 'train*.json' --dev_file dev.json --grad_cache --batch_size 8"
    " --pretrained_model_cfg bert-base-uncased --output_dir out --q_chunk_size 4",
    "generate_dense_embeddings --model_file models:/m-1 --ctx_file psgs.tsv --shard_id 1"
    " --num_shards 4 --out_file emb --batch_size 64 --fp16 --sequence_length 256 --do_lower_case",
    "dense_retriever.py --model_file models:/m-1 --ctx_file psgs.tsv --qa_file qas-dev.tsv"
    " --encoded_ctx_file 'emb_*' --out_file r.json --n-docs 50 --match regex"
    " --validation_workers 16 --save_or_load_index --no_cuda",
    "dense_retriever --model_file models:/m-1 --ctx_file psgs.tsv --qa_file qas-dev.tsv"
    " --encode_q_and_save --q_encoding_path q",
    "dense_retriever --ctx_file psgs.tsv --qa_file qas-dev.tsv --encoded_ctx_file emb"
    " --q_encoding_path q --n-docs 3",
    "preprocess_reader_data --retriever_results r.json --gold_passages gold.json"
    " --do_lower_case --pretrained_model_cfg bert-base-uncased --out_file o --is_train_set",
    "train_reader --encoder_model_type hf_bert --pretrained_model_cfg bert-base-uncased"
    " --train_file r.json --dev_file r.json --learning_rate 1e-5 --eval_step 2000"
    " --eval_top_docs 50 --warmup_steps 0 --sequence_length 350 --batch_size 16"
    " --passages_per_question 24 --num_train_epochs 2 --dev_batch_size 72"
    " --passages_per_question_predict 50 --output_dir reader --dropout 0.1",
    "train_reader --prediction_results_file p.json --eval_top_docs 10 20 --dev_file r.json"
    " --model_file reader --dev_batch_size 80 --passages_per_question_predict 100",
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("psgs.tsv", "qas-dev.tsv", "train1.json", "dev.json", "r.json", "gold.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "emb").mkdir()
    (tmp_path / "reader").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_originals_become_commands_that_parse(line: str) -> None:
    program, *flags = shlex.split(line)
    commands = commands_for(program, flags)
    assert commands
    for command in commands:
        check_ours(command)


def test_a_search_asks_for_the_accuracies_up_to_its_depth(files: Path) -> None:
    (command,) = commands_for(*_split(LINES[2]))
    text = shlex.join(command)
    assert command[:2] == ["search", "emb"]
    assert f"--dataset dpr:{files}/psgs.tsv?queries={files}/qas-dev.tsv --split dev" in (
        " ".join(command)
    )
    assert "--measures 'accuracy@1 accuracy@5 accuracy@20' --encoder models:/m-1" in text
    assert "--output r.json --format dpr --match regex --device cpu" in text
    (command,) = commands_for(*_split(LINES[4]))
    assert command[-4:] == ["--measures", "accuracy@1", "--queries", "q"]


@pytest.mark.parametrize(("run_id", "kept"), [("0123", ["0123"]), (None, []), ("", [])])
def test_only_a_training_has_an_encoder_to_keep(
    monkeypatch: pytest.MonkeyPatch, run_id: str | None, kept: list[str]
) -> None:
    """--compile_only and --help train nothing; of several processes the first one writes."""
    written: list[str] = []
    monkeypatch.setattr(train_command, "callback", lambda flags: run_id)
    monkeypatch.setattr(dpr_programs, "_keep_encoder", lambda run, flags: written.append(run))
    argv = ["train_dense_encoder", "--train_file", "train1.json", "--compile_only", "v5e:2x4"]
    assert dpr_command.main(argv, "mlflow-dr", standalone_mode=False) == 0
    assert written == kept


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_reeder", "no program 'train_reeder'; did you mean 'train_reader'"),
        ("train_reader --learning_rate 1", "needs --train_file, --dev_file, or both"),
        ("train_reader --dev_file r.json", "needs --model_file, or --train_file and --output_dir"),
        ("generate_dense_embeddings --ctx_file psgs.tsv", "needs --model_file, --out_file"),
        ("dense_retriever --qa_file x --ctx_file psgs.tsv --hnsw_index", "searches are exact here"),
        ("dense_retriever --qa_file x --ctx_file psgs.tsv --n-docs", "expected one argument"),
        ("dense_retriever --qa_file x --ctx_file psgs.tsv", "x: no such file"),
        ("dense_retriever --qa_fil x --ctx_file psgs.tsv", "unrecognized arguments: --qa_fil x"),
    ],
)
def test_what_cannot_be_done_gets_one_line(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        commands_for(*_split(line))
    assert "\n" not in str(caught.value)


def _split(line: str) -> tuple[str, list[str]]:
    program, *flags = shlex.split(line)
    return program, flags
