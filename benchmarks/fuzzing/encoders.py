"""Directories of encoders: ours, sentence-transformers', bare backbones' and adapters'."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzzing import damage, odd
from benchmarks.fuzzing.case import AnyOf, Case, Kind, UnreadableError
from benchmarks.fuzzing.collections import PASSAGES
from benchmarks.fuzzing.templates import QUERY_TEXTS, templates
from mlflow_dr.encoder.directory import LAYOUT

PASSAGE_TEXTS = [text for _, _, text in PASSAGES] + [" ".join(text for _, _, text in PASSAGES)]
HUGE = (2**31, 10**6, 10**9, 0, -1, 1e9, "128", None, True, [128], 10**30, float("nan"))
SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "model_type",
    "architectures",
    "pad_token_id",
    "hidden_dropout_prob",
    "dtype",
    "transformers_version",
    "auto_map",
    "attn_implementation",
    "quantization_config",
    "tie_word_embeddings",
    "is_decoder",
]
ADAPTER = [
    "base_model_name_or_path",
    "target_modules",
    "r",
    "lora_alpha",
    "peft_type",
    "task_type",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "auto_mapping",
    "layers_to_transform",
    "init_lora_weights",
    "use_dora",
    "exclude_modules",
]


def scores(directory: Path) -> np.ndarray:
    """The scores of each query with each passage, `(n_queries, n_passages)`."""
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.files import encoder_defect, step_of
    from mlflow_dr.pyfunc import TextsToVectors

    reason, step = encoder_defect(directory), step_of(directory)
    assert isinstance(reason, str), reason
    assert step is None or isinstance(step, int), step
    model = TextsToVectors(load_encoder(directory))
    queries = model.predict(QUERY_TEXTS, {"prompt": "query"})
    return queries @ model.predict(PASSAGE_TEXTS, {"prompt": "passage"}).T


def library(directory: Path, dot: bool = False, queries: Sequence[str] = QUERY_TEXTS) -> np.ndarray:
    """The same scores by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(directory), device="cpu", model_kwargs={"dtype": "float32"}, local_files_only=True
    )
    asked = model.encode_query(list(queries), show_progress_bar=False)
    passages = model.encode_document(PASSAGE_TEXTS, show_progress_bar=False)
    made = asked @ passages.T if dot else model.similarity(asked, passages).numpy()
    return np.asarray(made, np.float32)


def described(directory: Path) -> np.ndarray:
    """The library's scores if our own settings file is sound.

    Raises:
        UnreadableError: a setting is missing, unknown or has another type.
    """
    try:
        values = json.loads((directory / "mlflow_dr.json").read_text(encoding="utf-8"))
        own, layout = values["encoder"], values["layout"]
        kinds = {"title_separator": str, "strip_question_mark": bool}
        right = set(own) == set(kinds) and all(type(own[name]) is kinds[name] for name in kinds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableError("no description") from error
    if not right or type(layout) is not int or layout != LAYOUT:
        raise UnreadableError("a setting is missing, unknown, or of another type")
    texts = [text.removesuffix("?") for text in QUERY_TEXTS]
    return library(directory, queries=texts if own["strip_question_mark"] else QUERY_TEXTS)


def hurt(chance: Random, directory: Path) -> tuple[Path, str]:
    """Damage one file of a directory; returns its path and a description of the damage."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    documents = [file for file in files if file.suffix == ".json" and file.name != "tokenizer.json"]
    path = chance.choice((chance.choice(documents), chance.choice(documents), chance.choice(files)))
    name = str(path.relative_to(directory))
    if path.suffix == ".safetensors" and chance.random() < 0.5:
        return path, f"{name}: {header(chance, path)}"
    if path.suffix != ".json" or path.name == "tokenizer.json" or chance.random() < 0.25:
        return path, f"{name}: {damage.file(chance, path)}"
    values = json.loads(path.read_text(encoding="utf-8"))
    keys = {"config.json": SIZES, "adapter_config.json": ADAPTER}.get(name, ())
    if keys and chance.random() < 0.5:
        key = chance.choice(keys)
        values[key] = chance.choice((chance.choice(HUGE), odd.value(chance)))
        how = f"{key} = {values[key]!r:.60}"
    else:
        values, how = damage.tree(chance, values)
    path.write_bytes(damage.dumped(chance, values, 2))
    return path, f"{name}: {how}"


def header(chance: Random, path: Path) -> str:
    """Damage the header of a safetensors file; its length stays correct."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values, how = damage.tree(chance, json.loads(data[8 : 8 + length]))
    made = damage.dumped(chance, values)
    path.write_bytes(struct.pack("<Q", len(made)) + made + data[8 + length :])
    return f"header: {how}"


def stray(chance: Random, directory: Path) -> str:
    """Add a file that no encoder reads."""
    name = chance.choice(
        (
            "README.md",
            ".gitattributes",
            "optimizer.pt",
            "notes.json",
            "onnx/model.onnx",
            "a b.txt",
            ".lock",
            "trainer_state.json",
        )
    )
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damage.raw(chance, b'{"global_step": 5, "a": [1, 2]}\n')[0])
    return f"{name} beside it"


@cache
def sound(kind: str) -> np.ndarray:
    """Scores of the undamaged directory."""
    return library(templates()[kind], kind == "bare")


def directory(kinds: tuple[str, ...]) -> Callable[[Random, Path], Case]:
    """Cases of directories of these kinds."""

    def make(chance: Random, workdir: Path) -> Case:
        kind = chance.choice(kinds)
        right = sound(kind)
        encoder_dir = workdir / "encoder"
        shutil.copytree(templates()[kind], encoder_dir)
        if chance.random() < 0.06:
            path, how = encoder_dir, stray(chance, encoder_dir)
        else:
            path, how = hurt(chance, encoder_dir)
            if path.name == "adapter_config.json" and chance.random() < 0.1:
                values = {
                    **json.loads((templates()[kind] / path.name).read_text()),
                    "base_model_name_or_path": str(encoder_dir),
                }
                path.unlink(missing_ok=True)
                path.write_text(json.dumps(values))
                how = "an adapter of itself"

        def plain() -> Any:
            # without it the directory is sentence-transformers'
            own = path == encoder_dir / "mlflow_dr.json" and (path.exists() or path.is_symlink())
            made = [] if own else [right]
            reasons = []
            for read in (described, lambda target: library(target, kind == "bare")):
                if read is not described and own:
                    continue
                try:
                    made.append(read(encoder_dir))
                except Exception as error:  # noqa: BLE001 - damage of any kind
                    reasons.append(
                        type(error).__name__
                        if not isinstance(error, UnreadableError)
                        else str(error)
                    )
            if not made:
                raise UnreadableError(f"{path.name}: {', '.join(reasons)}")
            return AnyOf(made)

        return Case(f"{kind}: {how}", lambda: scores(encoder_dir), plain, ("encoder", path.name))

    return make


KINDS = [
    Kind("encoder-ours", directory(("ours", "ours", "towers")), 8, templates),
    Kind("encoder-st", directory(("mean", "dense", "dot")), 9, templates),
    Kind("encoder-bare", directory(("bare",)), 5, templates),
    Kind("encoder-adapter", directory(("adapter",)), 6, templates),
]
