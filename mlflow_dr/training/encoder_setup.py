"""From a request to the things that are trained with: encoder, training set, collator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.tiny import tiny_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer, append_eos
from mlflow_dr.errors import CheckpointError, UsageError, one_line
from mlflow_dr.tracking.encoders import MODEL_SCHEME
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.batches import Collator, TrainingSet, check_negatives, training_set
from mlflow_dr.training.data import Mixture, TrainingData
from mlflow_dr.training.flags import ADAPTER, MERGED

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
        for tower in encoder.distinct_encoders:
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
    elif encoder.untied_query_encoder is not None:
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


def _tokenizings(encoder: Encoder) -> tuple[TextTokenizer, TextTokenizer]:
    tower = encoder.query_encoder
    return (
        TextTokenizer(tower.tokenizer, tower.settings),
        TextTokenizer(encoder.tokenizer, encoder.settings),
    )


def _texts(data: TrainingData) -> Iterator[str]:
    for part in data.parts:
        for index in range(len(part.examples)):
            example = part.examples[index]
            yield example.query.text
            for passage in part.examples.passages.passages(example.positives):
                yield f"{passage.title} {passage.text}"


# transformers' names for the dropout of hidden states and of attention
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout_rate",
    "dropout",
)
BERT_SEPARATOR = "[SEP]"


def set_dropout(encoder: Encoder, probability: float) -> None:
    """Give the backbones this dropout, and their configuration, so that checkpoints say so."""
    for tower in encoder.distinct_encoders:
        for part in (tower.backbone.config, *tower.backbone.modules()):
            for name in DROPOUTS:
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, probability)
            if isinstance(part, nn.Dropout):
                part.p = probability


def lower_case(encoder: Encoder) -> None:
    """Have all texts lower-cased; a tokenizer that does it already is left alone."""
    for tower in encoder.distinct_encoders:
        words = (tower.tokenizer(text)["input_ids"] for text in ("Ab CD", "ab cd"))
        if len({tuple(ids) for ids in words}) > 1:
            tower.settings = replace(tower.settings, lowercase=True)


def check_separator(tokenizer: Any, separator: str) -> None:
    """Refuse BERT's separator for a tokenizer that would take it for text.

    Raises:
        UsageError: with the tokenizer's own separator.
    """
    if BERT_SEPARATOR in separator and BERT_SEPARATOR not in tokenizer.get_vocab():
        own = tokenizer.sep_token or tokenizer.eos_token or " "
        raise UsageError(
            f"--passage_field_separator: this model's tokenizer has no {BERT_SEPARATOR}, which "
            f"DPR's recipe puts between title and text; pass --passage_field_separator {own!r}"
        )


def freeze_passages(encoder: Encoder) -> None:
    """Leave the queries' weights alone to be trained.

    Raises:
        UsageError: queries have no weights of their own.
    """
    if encoder.untied_query_encoder is None:
        raise UsageError(
            "--fix_ctx_encoder leaves nothing to train where queries and passages have one "
            "encoder; add --untie_encoder"
        )
    encoder.requires_grad_(False)
    encoder.untied_query_encoder.requires_grad_(True)


WEIGHTS = "model_dict"
QUERIES, PASSAGES = "question_model.", "ctx_model."
PROJECTION = "encode_proj."
UNUSED = ("pooler.", "embeddings.position_ids")


def load_dpr_weights(file: str, encoder: Encoder) -> None:
    """Replace an encoder's weights by those of a DPR checkpoint; nothing in the file is run.

    Args:
        file: what DPR wrote by `torch.save`: `model_dict` with `question_model.*` and
            `ctx_model.*`.
        encoder: with weights of their own for queries.

    Raises:
        UsageError: there is no such file, or the encoder is not of its shape.
        CheckpointError: the file is damaged, of another kind, or would run code.
    """
    if encoder.untied_query_encoder is None:
        raise UsageError("--model_file has two encoders; add --untie_encoder")
    state = _read(Path(file).expanduser())
    for prefix, tower in ((QUERIES, encoder.untied_query_encoder), (PASSAGES, encoder)):
        part = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        if not part:
            raise CheckpointError(f"{file}: {WEIGHTS} has no {prefix}*; expected DPR's bi-encoder")
        _load(file, tower, part)


def _load(file: str, tower: Encoder, part: Mapping[str, Tensor]) -> None:
    layer = {
        name.removeprefix(PROJECTION): value
        for name, value in part.items()
        if name.startswith(PROJECTION)
    }
    weights = {
        name: value for name, value in part.items() if not name.startswith((PROJECTION, *UNUSED))
    }
    projections: list[Any] = [module for module in tower.head if hasattr(module, "linear")]
    if bool(layer) != bool(projections):
        size = len(layer["weight"]) if "weight" in layer else 0
        raise UsageError(f"--model_file {file} needs --projection_dim {size}")
    try:
        missing, unexpected = tower.backbone.load_state_dict(weights, strict=False)
        if layer:
            projections[0].linear.load_state_dict(layer)
    except RuntimeError as error:
        raise UsageError(
            f"--model_file {file}: its weights are not of the model's shape; name the model that "
            f"it was trained from by --pretrained_model_cfg ({one_line(error)[:200]})"
        ) from error
    missing = [name for name in missing if not name.startswith(UNUSED)]
    if missing or unexpected:
        what, name = ("lacks", missing[0]) if missing else ("has an unknown", unexpected[0])
        raise UsageError(f"--model_file {file} {what} {name}; is it of another kind of model?")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"--model_file {path}: no such file")
    try:
        read: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"--model_file {path}: damaged, or it holds objects whose code would run; where you "
            f"trust it, keep its weights alone: torch.save({{'{WEIGHTS}': torch.load(FILE, "
            f"weights_only=False)['{WEIGHTS}']}}, NEW_FILE) ({type(error).__name__})"
        ) from error
    state = read.get(WEIGHTS) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"--model_file {path}: no {WEIGHTS} of tensors; expected DPR's file")
    return state
