from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from mlflow_dr.cli import group
from mlflow_dr.errors import UsageError
from mlflow_dr.reader.dpr_checkpoint import export_dpr_reader, import_dpr_reader
from mlflow_dr.reader.model import load_reader, save_reader

IDS = torch.tensor([[2, 9, 3, 7, 3, 6, 7, 8], [2, 9, 3, 7, 3, 6, 0, 0]])


def run(*argv: object) -> None:
    result = CliRunner().invoke(group, [*map(str, argv)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@torch.inference_mode()
def logits(reader: Any) -> Any:
    return reader(IDS, (IDS != 0).long())


def assert_same(one: Any, other: Any) -> None:
    for mine, theirs in zip(logits(one), logits(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_reader_goes_to_dprs_file_and_back(
    make_reader: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    reader = make_reader()
    save_reader(tmp_path / "reader", reader, tokenizer)
    run("export", tmp_path / "reader", "--output", tmp_path / "dpr.cp", "--backbone", "a-bert")
    names = torch.load(tmp_path / "dpr.cp", weights_only=True)["model_dict"]
    heads = {
        f"qa_{kind}.{part}" for kind in ("outputs", "classifier") for part in ("weight", "bias")
    }
    assert {name for name in names if not name.startswith("encoder.")} == heads
    again = tmp_path / "again"
    run("import", tmp_path / "dpr.cp", "--output", again, "--backbone", tmp_path / "reader")
    assert_same(load_reader(str(again))[0], reader)
    other = transformers.BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="by --backbone"):
        import_dpr_reader(tmp_path / "dpr.cp", str(tmp_path / "other"))


def test_a_reader_of_transformers_is_imported(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.DPRConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    theirs = transformers.DPRReader(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    run("import", tmp_path / "theirs", "--output", tmp_path / "ours")
    mask = (IDS != 0).long()
    with torch.inference_mode():
        expected = theirs(IDS, attention_mask=mask)
    starts, ends, relevance = logits(load_reader(str(tmp_path / "ours"))[0])
    for mine, wanted in ((starts, expected.start_logits), (ends, expected.end_logits)):
        torch.testing.assert_close(mine[mask == 1], wanted[mask == 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(relevance, expected.relevance_logits, rtol=0, atol=1e-5)


def test_a_reader_of_dpr_since_2021_has_segment_ids(
    make_reader: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    save_reader(tmp_path / "reader", make_reader(), tokenizer)
    run("export", tmp_path / "reader", "--output", tmp_path / "2020.cp", "--backbone", "a-bert")
    content = torch.load(tmp_path / "2020.cp", weights_only=True)
    settings = {"do_lower_case": True, "encoder": content["encoder_params"]}
    torch.save({**content, "encoder_params": settings}, tmp_path / "2021.cp")
    imported = tmp_path / "imported"
    run("import", tmp_path / "2021.cp", "--output", imported, "--backbone", tmp_path / "reader")
    reader = load_reader(str(imported))[0]
    states = reader.backbone(
        input_ids=IDS[:1], token_type_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    ).last_hidden_state
    expected = reader.qa_classifier(states[:, 0])[:, 0]
    torch.testing.assert_close(logits(reader).relevance[:1], expected, rtol=0, atol=1e-5)
    reader.train()  # with embeddings that are looked up once
    for module in reader.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = reader(IDS, (IDS != 0).long()).relevance[:1]
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="segment ids"):
        export_dpr_reader(reader, tokenizer, tmp_path / "back.cp", "a-bert")
