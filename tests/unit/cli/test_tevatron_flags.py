"""Tevatron's command lines of encoding and search, in our words."""

import re
from pathlib import Path

import click
import pytest

from mlflow_dr.cli import tevatron, vectors
from mlflow_dr.cli.options import from_flags
from mlflow_dr.errors import UsageError
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig

PAGE = Path(__file__).parents[3] / "docs" / "from-tevatron.md"


def encoding(line: str) -> EncodeConfig:
    with vectors.encode_command.make_context("encode", line.split()) as context:
        return from_flags(EncodeConfig, context.params)


def searching(line: str) -> SearchConfig:
    with vectors.search_command.make_context("search", line.split()) as context:
        return from_flags(SearchConfig, context.params)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the outputs of three shards."""
    monkeypatch.chdir(tmp_path)
    for shard in range(3):
        (tmp_path / f"corpus_emb_0{shard}.pkl").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir=temp --model_name_or_path model_nq --fp16 --per_device_eval_batch_size 156 "
        "--p_max_len 128 --dataset_name Tevatron/wikipedia-nq-corpus "
        "--encoded_save_path corpus_emb_08.pkl --encode_num_shard 20 --encode_shard_index 08",
        "--output_dir temp --model_name_or_path model_nq --fp16 --per_device_eval_batch_size 156 "
        "--passage_max_len 128 --dataset_name Tevatron/wikipedia-nq-corpus "
        "--encode_output_path corpus_emb_08.pkl "
        "--dataset_number_of_shards 20 --dataset_shard_index 8",
    ],
    ids=["v1", "v3"],
)
def test_a_shard_of_a_corpus_is_encoded_as_in_tevatron(line: str) -> None:
    assert encoding(line) == EncodeConfig(
        encoder="model_nq",
        dataset="Tevatron/wikipedia-nq",
        output=Path("corpus_emb_08.pkl"),
        shard="8/20",
        p_max_len=128,
        dtype="fp16",
    )


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir=temp --model_name_or_path model_nq --fp16 --per_device_eval_batch_size 156 "
        "--dataset_name Tevatron/wikipedia-nq/test --encoded_save_path query.pkl --q_max_len 32 "
        "--encode_is_qry",
        "--output_dir temp --model_name_or_path model_nq --fp16 --per_device_eval_batch_size 156 "
        "--dataset_name Tevatron/wikipedia-nq --dataset_split test --encode_output_path query.pkl "
        "--query_max_len 32 --encode_is_query",
    ],
    ids=["v1", "v3"],
)
def test_queries_are_encoded_as_in_tevatron(line: str) -> None:
    assert encoding(line) == EncodeConfig(
        encoder="model_nq",
        dataset="Tevatron/wikipedia-nq",
        split="test",
        output=Path("query.pkl"),
        q_max_len=32,
        dtype="fp16",
    )


def test_adapters_prompts_and_pooling_are_taken() -> None:
    config = encoding(
        "--output_dir temp --model_name_or_path mistral --lora_name_or_path retriever-mistral "
        "--lora --bf16 --pooling eos --append_eos_token --normalize --encode_is_query "
        "--query_max_len 32 --passage_max_len 156 --dataset_name Tevatron/msmarco-passage "
        "--dataset_split dev --query_prefix query: --passage_prefix passage: "
        "--encode_output_path query-dev.pkl"
    )
    assert config == EncodeConfig(
        encoder="retriever-mistral",
        dataset="Tevatron/msmarco-passage",
        split="dev",
        output=Path("query-dev.pkl"),
        pooling="last",
        normalize=True,
        append_eos_token=True,
        q_max_len=32,
        p_max_len=156,
        query_prompt="query:",
        passage_prompt="passage:",
        dtype="bf16",
    )
    assert config.encoder_changes["query_prompt"] == "query:"


@pytest.mark.parametrize("flag", ["--encode_in_path", "--dataset_path"])
def test_files_of_texts_are_encoded_as_in_tevatron(flag: str) -> None:
    line = f"--model_name_or_path m --dataset_name json {flag} x.jsonl --encode_output_path out"
    passages = EncodeConfig(encoder="m", texts=(Path("x.jsonl"),), output=Path("out"))
    assert encoding(line) == passages
    assert encoding(f"{line} --encode_is_query") == passages.replaced(texts_are_queries=True)


def test_switches_may_have_a_value() -> None:
    line = "--tf32 True --normalize False --fp16 true --encode_is_query=True --dataset_split dev"
    config = encoding(f"--model_name_or_path m --dataset_name d --encode_output_path o {line}")
    assert (config.normalize, config.dtype, config.split) == (False, "fp16", "dev")


def test_our_own_flags_are_left_as_they_are() -> None:
    assert encoding("my-encoder --dataset demo --split dev --output q --shard 1/2") == EncodeConfig(
        encoder="my-encoder", dataset="demo", split="dev", output=Path("q"), shard="1/2"
    )
    assert searching("a --queries q --output out --format trec") == SearchConfig(
        sources=(Path("a"),), queries=Path("q"), output=Path("out"), file_format="trec"
    )


def test_the_folders_that_fit_a_pattern_are_searched(folders: Path) -> None:
    config = searching(
        "--query_reps query_emb.pkl --passage_reps corpus_emb*.pkl --depth 100 --batch_size -1 "
        "--save_text --save_ranking_to rank.txt"
    )
    assert config == SearchConfig(
        sources=tuple(Path(f"corpus_emb_0{shard}.pkl") for shard in range(3)),
        partial=True,
        keep_own_id=True,
        queries=Path("query_emb.pkl"),
        depth=100,
        output=Path("rank.txt"),
        file_format="tevatron",
    )


@pytest.mark.parametrize(
    "line",
    [
        "--score_dir parts --query query.pkl --save_ranking_to rank.txt",
        "--results_dir parts --output rank.txt",
    ],
    ids=["v1", "v3"],
)
def test_rankings_of_shards_are_merged_as_in_tevatron(line: str, folders: Path) -> None:
    parts = folders / "parts"
    parts.mkdir()
    for name in ("01", "00"):
        (parts / name).touch()
    assert searching(line) == SearchConfig(
        sources=(Path("parts/00"), Path("parts/01")),
        merge=True,
        keep_own_id=True,
        output=Path("rank.txt"),
        file_format="tevatron",
    )


def test_flags_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    encoding("my-encoder --dataset demo --output p --output_dir temp --tf32 --cache_dir x")
    assert caplog.messages == ["--output_dir, --tf32, --cache_dir: accepted, without effect"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model_name_or_path m --dataset_name d --encode_is_query", "--dataset_split"),
        ("--model_name_or_path m --fp16 --bf16", "exclude each other"),
        ("--model_name_or_path", "needs a value"),
        ("--model_name_or_path m --dataset d --dataset_shard_index 4 --output o", "4/1.*0/1"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoding(line)


def test_a_pattern_or_a_folder_without_files_is_refused(folders: Path) -> None:
    with pytest.raises(UsageError, match="nothing fits 'x"):
        searching("--query_reps q --passage_reps x*.pkl --save_ranking_to r")
    with pytest.raises(UsageError, match="no rankings"):
        searching("--score_dir corpus_emb_00.pkl --save_ranking_to r")


def test_every_flag_of_tevatron_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    sets = [value for name, value in vars(tevatron).items() if re.match("(ENCODE|SEARCH)_", name)]
    for name in {name for names in sets for name in names}:
        assert f"`--{name[2:].replace('-', '_')}`" in page, name


def test_the_flags_of_tevatron_are_none_of_ours() -> None:
    for command, sets in (
        (vectors.encode_command, (tevatron.ENCODE_VALUES - {"--pooling"}, tevatron.ENCODE_IGNORED)),
        (vectors.search_command, (tevatron.SEARCH_VALUES, tevatron.SEARCH_IGNORED)),
    ):
        ours = {
            flag
            for param in command.params
            if isinstance(param, click.Option)
            for flag in param.opts
        }
        for names in sets:
            assert not ours & names
