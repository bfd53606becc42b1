"""The params of a run: those that count."""

from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.run_params import PARTS, params_of

USUAL = ["--dataset", "sea", "--model", "tiny", "--use_cpu"]


def test_what_is_off_has_no_params() -> None:
    params = params_of(parse_training([*USUAL, "--bf16", "false", "--gc_p_chunk_size", "8"]))
    absent = {*PARTS, *(name for names in PARTS.values() for name in names), "document_store"}
    assert not absent & params.keys()
    assert [name for name, value in params.items() if value is False] == ["bf16", "fp16"]
    assert (params["model"], params["dataset_name"], params["loss"]) == (
        "tiny",
        "sea",
        "contrastive",
    )


def test_what_is_on_has_its_params_even_at_their_defaults() -> None:
    params = params_of(parse_training([*USUAL, "--grad_cache", "--lora", "--lora_r", "4"]))
    assert (params["gc_q_chunk_size"], params["gc_p_chunk_size"]) == (4, 32)
    assert (params["lora_r"], params["lora_alpha"]) == (4, 64)
