"""Sound directories of encoders, by kind."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.fuzzing.caches import tiny
from benchmarks.fuzzing.collections import PASSAGES, QUERIES

QUERY_TEXTS = [text for _, text, _ in QUERIES]


@cache
def templates() -> dict[str, Path]:
    """Sound directories; created once, and used again if the process is restarted."""
    folder = Path(tempfile.gettempdir(), "fuzz-encoders")
    names = ("ours", "towers", "adapter", "bare", "mean", "dense", "dot")
    made = {name: folder / name for name in names}
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_templates(folder, made)
        (folder / "done").touch()
    return made


def make_templates(folder: Path, made: dict[str, Path]) -> None:
    import torch
    from sentence_transformers import SentenceTransformer, models

    from mlflow_dr.encoder.backbone import tiny_encoder
    from mlflow_dr.encoder.config import EncoderConfig
    from mlflow_dr.encoder.lora import add_lora
    from mlflow_dr.encoder.model import untie, with_projection
    from mlflow_dr.encoder.saving import save_encoder

    torch.manual_seed(0)
    texts = [f"{title} {text}" for _, title, text in PASSAGES] + QUERY_TEXTS
    config = EncoderConfig("mean", True, "query: ", "passage: ", 16, 24)
    ours = with_projection(tiny_encoder(texts, config), None, 16).eval()
    save_encoder(made["ours"], ours)
    towers = with_projection(tiny_encoder(texts, config), None, 16)
    untie(towers)
    with torch.no_grad():
        for weight in towers.untied_query_encoder.parameters():  # type: ignore[union-attr]
            weight.add_(0.05 * torch.randn_like(weight))
    save_encoder(made["towers"], towers.eval())
    bare = tiny()
    bare.backbone.save_pretrained(made["bare"])
    bare.tokenizer.save_pretrained(made["bare"])
    adapted = tiny_encoder(texts, EncoderConfig("mean", True, "", "", 16, 24))
    adapted.backbone.save_pretrained(folder / "base")
    adapted.tokenizer.save_pretrained(folder / "base")
    add_lora(adapted, str(folder / "base"), rank=4, alpha=8, dropout=0.0, merged=False)
    with torch.no_grad():
        for name, weight in adapted.backbone.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    save_encoder(made["adapter"], adapted.eval(), merged=False)
    word = models.Transformer(str(made["bare"]), max_seq_length=24)
    prompts = {"query": "query: ", "document": "passage: "}
    mean = SentenceTransformer(
        modules=[word, models.Pooling(128, "mean")], prompts=prompts, device="cpu"
    )
    mean.save(str(made["mean"]), create_model_card=False)
    dense = models.Dense(128, 16, activation_function=torch.nn.Tanh())
    cls = [word, models.Pooling(128, "cls"), dense, models.Normalize()]
    SentenceTransformer(modules=cls, device="cpu").save(str(made["dense"]), create_model_card=False)
    dot = SentenceTransformer(
        modules=[word, models.Pooling(128, "max")], similarity_fn_name="dot", device="cpu"
    )
    dot.save(str(made["dot"]), create_model_card=False)
