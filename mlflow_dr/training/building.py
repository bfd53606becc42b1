"""From a request to the things that are trained with: encoder, training set, collator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow_dr.encoder.changes import append_eos, untie, with_projection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.source import encoder_directory
from mlflow_dr.encoder.tiny import tiny_encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.encoders import MODEL_SCHEME
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.backbones import (
    check_separator,
    freeze_passages,
    lower_case,
    set_dropout,
)
from mlflow_dr.training.batches import Collator, TrainingSet, check_negatives, training_set
from mlflow_dr.training.data import TrainingData
from mlflow_dr.training.dpr_weights import load_dpr_weights
from mlflow_dr.training.mixture import Mixture
from mlflow_dr.training.ranges import ADAPTER, MERGED

TINY = "tiny"


def build_encoder(request: TrainingRequest, data: TrainingData, start: str) -> Encoder:
    """The encoder that a request describes, as it is before the first step.

    Args:
        request: what is asked for.
        data: what it is trained on.
        start: the encoder's directory or hub name; a published one's files.

    Raises:
        UsageError: there is no such encoder, or the flags do not fit it.
        CheckpointError: its files are damaged.
    """
    model = request.model
    if model.model_name_or_path == TINY:
        if model.lora and model.lora_publish == ADAPTER:
            raise UsageError("tiny is made anew each time; publish its adapters merged")
        if model.tokenizer_name:
            raise UsageError("--tokenizer_name: tiny learns a vocabulary of its own")
        encoder = tiny_encoder(_texts(data), request.fresh_encoder_config())
        if model.attn_implementation:
            encoder.backbone.set_attn_implementation(model.attn_implementation)
    else:
        changes: dict[str, Any] = request.encoder_changes()
        encoder = load_encoder(
            start,
            attention=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            tokenizer=model.tokenizer_name,
            cache_dir=model.cache_dir,
            bare_pooling=request.bare_pooling,
            **changes,
        )
    _adjust(encoder, request)
    if model.append_eos_token:
        for tower in encoder.towers:
            append_eos(tower.tokenizer)
    if model.add_pooler:
        encoder = with_projection(encoder, model.projection_in_dim, model.projection_out_dim)
    if model.lora and model.lora_publish == ADAPTER:
        _check_base(request, encoder)
    if model.untie_encoder:
        untie(encoder)
    if model.model_file:
        load_dpr_weights(model.model_file, encoder)
    if model.lora:
        targets = model.lora_target_modules
        adapters = model.lora_name_or_path
        add_lora(
            encoder,
            _lasting(model.model_name_or_path),
            rank=model.lora_r,
            alpha=model.lora_alpha,
            dropout=model.lora_dropout,
            targets=targets.split(",") if targets else None,
            start=encoder_directory(adapters, model.cache_dir) if adapters else None,
            merged=model.lora_publish == MERGED,
        )
    if model.fix_ctx_encoder:
        freeze_passages(encoder)
    return encoder


def _adjust(encoder: Encoder, request: TrainingRequest) -> None:
    """Change what flags say of a loaded encoder's backbone and tokenizer."""
    model = request.model
    check_separator(encoder.tokenizer, request.data.passage_field_separator)
    if model.dropout is not None:
        set_dropout(encoder, model.dropout)
    if model.do_lower_case:
        lower_case(encoder)


def _check_base(request: TrainingRequest, encoder: Encoder) -> None:
    """Refuse to publish adapters alone where nobody could say what they are put on."""
    name = request.model.model_name_or_path
    if request.model.model_file:
        why = "adapters name a backbone to be put on, and --model_file replaces its weights"
    elif encoder.query_tower is not None:
        why = "adapters name one backbone to be put on, and this encoder has two"
    elif name.startswith(MODEL_SCHEME):
        why = f"adapters name a directory or a hub name to be put on, and {name} is neither"
    else:
        return
    raise UsageError(f"--lora_publish adapter: {why}; publish them merged")


def mixed_training_set(
    request: TrainingRequest, data: TrainingData, encoder: Encoder
) -> TrainingSet | Mixture:
    """The examples with their passages chosen epoch by epoch, over token tables."""
    queries, passages = _tokenizings(encoder)
    seed = request.trainer.seed
    sets = []
    first_key = 0
    for part in data.parts:
        check_negatives(part.examples, request.data.train_n_passages, part.name)
        sets.append(
            training_set(
                part.examples,
                queries,
                passages,
                table=request.data.token_table,
                processes=request.data.dataset_proc_num,
                n_passages=request.data.train_n_passages,
                seed=seed,
                with_scores=request.loss.distil_weight > 0,
                first_key=first_key,
                first_positive=request.data.positive_passage_no_shuffle,
                n_others=request.data.other_negatives,
            )
        )
        first_key += len(part.examples.passages)
    rates = [part.rate for part in data.parts]
    if len(sets) == 1 and rates == [1]:
        return sets[0]
    counts = [rate * len(part.examples) for rate, part in zip(rates, data.parts, strict=True)]
    weights = [part.weight or float(n) for part, n in zip(data.parts, counts, strict=True)]
    return Mixture(sets, weights, seed, sum(counts))


def collator_of(encoder: Encoder) -> Collator:
    """What pads batches for an encoder."""
    queries, passages = _tokenizings(encoder)
    return Collator(queries.pad_id, passages.pad_id)


def _lasting(name: str) -> str:
    """The name of an encoder, whole where it is a folder's: others read it from elsewhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _tokenizings(encoder: Encoder) -> tuple[Tokenizing, Tokenizing]:
    tower = encoder.for_queries
    return (
        Tokenizing(tower.tokenizer, tower.settings),
        Tokenizing(encoder.tokenizer, encoder.settings),
    )


def _texts(data: TrainingData) -> Iterator[str]:
    for part in data.parts:
        for index in range(len(part.examples)):
            example = part.examples[index]
            yield example.query.text
            for passage in part.examples.passages.passages(example.positives):
                yield f"{passage.title} {passage.text}"
