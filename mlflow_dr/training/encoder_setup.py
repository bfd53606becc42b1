"""Builds the encoder, training set and collator of a training request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.dpr_checkpoint import load_dpr_weights, read_dpr_checkpoint
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.tokenize import TextTokenizer, append_eos
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.encoders import MODEL_SCHEME, resolve_encoder
from mlflow_dr.training.arguments import ModelArguments, TrainingRequest
from mlflow_dr.training.batches import Collator, TrainingSet, check_negatives, training_set
from mlflow_dr.training.data import Mixture, TrainingData
from mlflow_dr.training.flags import ADAPTER, MERGED

TINY = "tiny"


def build_encoder(request: TrainingRequest, data: TrainingData, start: str) -> Encoder:
    """The encoder of a training request, as it is before the first step.

    Args:
        request: the flags.
        data: the training data; the vocabulary of `tiny` is learnt from it.
        start: directory or hub name of the encoder.

    Raises:
        UsageError: there is no such encoder, or the flags do not fit it.
        CheckpointError: its files are damaged.
    """
    model = request.model
    if model.model_name_or_path == TINY:
        if model.lora and model.lora_publish == ADAPTER:
            raise UsageError("the base of adapters of tiny is not saved; publish them merged")
        if model.tokenizer_name:
            raise UsageError(
                "--tokenizer_name cannot be used with tiny, which has its own vocabulary"
            )
        from mlflow_dr.encoder.backbone import tiny_encoder

        encoder = tiny_encoder(_texts(data), request.fresh_encoder_config())
        if model.attn_implementation:
            encoder.backbone.set_attn_implementation(model.attn_implementation)
    else:
        encoder = load_encoder(
            start,
            attention=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            tokenizer=model.tokenizer_name,
            cache_dir=model.cache_dir,
            bare_pooling=request.bare_pooling,
            **request.encoder_changes(),
        )
    check_separator(encoder.tokenizer, request.data.passage_field_separator)
    if model.dropout is not None:
        for side in encoder.distinct_encoders:
            set_dropout(side.backbone, model.dropout)
    if model.do_lower_case:
        lower_case(encoder)
    if model.append_eos_token:
        for side in encoder.distinct_encoders:
            append_eos(side.tokenizer)
    if model.add_pooler:
        encoder = with_projection(encoder, model.projection_in_dim, model.projection_out_dim)
    if model.lora and model.lora_publish == ADAPTER:
        _check_base(request, encoder)
    if model.untie_encoder:
        untie(encoder)
    if model.model_file:
        checkpoint = read_dpr_checkpoint(Path(model.model_file).expanduser())
        load_dpr_weights(checkpoint, encoder)
    if model.lora:
        _add_adapters(encoder, model)
    if model.fix_ctx_encoder:
        freeze_passages(encoder)
    return encoder


def check_encoder(name: str, tracking_uri: str | None = None, cache_dir: str | None = None) -> None:
    """Refuse an encoder to begin with that does not exist; one of the hub is fetched.

    Args:
        name: as `--model` takes it.
        tracking_uri: the server of `models:/`; the environment's when None.
        cache_dir: the folder for files from the hub; Hugging Face's own cache when None.

    Raises:
        UsageError: there is no such encoder.
        TrackingError: there is no such checkpoint, or no server.
    """
    source = resolve_encoder(name, tracking_uri)
    if isinstance(source, str) and source != TINY:
        encoder_directory(source, cache_dir)


def _add_adapters(encoder: Encoder, model: ModelArguments) -> None:
    """Add adapters to the encoder, or continue those that the flags name."""
    targets, adapters = model.lora_target_modules, model.lora_name_or_path
    add_lora(
        encoder,
        _absolute(model.model_name_or_path),
        rank=model.lora_r,
        alpha=model.lora_alpha,
        dropout=model.lora_dropout,
        targets=targets.split(",") if targets else None,
        start=encoder_directory(adapters, model.cache_dir) if adapters else None,
        merged=model.lora_publish == MERGED,
    )


def _check_base(request: TrainingRequest, encoder: Encoder) -> None:
    """Refuse to publish adapters alone if their base cannot be named."""
    name = request.model.model_name_or_path
    if request.model.model_file:
        why = "the base of adapters must be a model by name, but --model_file replaces its weights"
    elif encoder.untied_query_encoder is not None:
        why = "adapters have one base, but this encoder has two backbones"
    elif name.startswith(MODEL_SCHEME):
        why = f"the base of adapters must be a directory or a hub name, not {name}"
    else:
        return
    raise UsageError(f"--lora_publish adapter: {why}; publish them merged")


def mixed_training_set(
    request: TrainingRequest, data: TrainingData, encoder: Encoder
) -> TrainingSet | Mixture:
    """The training set, with passages chosen anew for each epoch; the datasets are mixed."""
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
                store=None if request.data.token_table else request.data.document_store,
                processes=request.data.dataset_proc_num,
                n_passages=request.data.train_n_passages,
                seed=seed,
                with_scores=request.loss.objective().needs_teacher,
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
    """The collator for an encoder."""
    queries, passages = _tokenizings(encoder)
    return Collator(queries.pad_id, passages.pad_id)


def _absolute(name: str) -> str:
    """The name of an encoder; an absolute path if it is a directory."""
    directory = Path(name).expanduser()
    return str(directory.resolve()) if directory.is_dir() else name


def _tokenizings(encoder: Encoder) -> tuple[TextTokenizer, TextTokenizer]:
    return TextTokenizer.of(encoder.query_encoder), TextTokenizer.of(encoder)


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


def set_dropout(model: Any, probability: float) -> None:
    """Set the dropout of a transformer and of its configuration, which checkpoints save."""
    for part in (model.config, *model.modules()):
        for name in DROPOUTS:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, probability)
        if isinstance(part, nn.Dropout):
            part.p = probability


def lower_case(encoder: Encoder) -> None:
    """Lower-case all texts, unless the tokenizer already does it."""
    for side in encoder.distinct_encoders:
        token_ids = (side.tokenizer(text)["input_ids"] for text in ("Ab CD", "ab cd"))
        if len({tuple(ids) for ids in token_ids}) > 1:
            side.settings = replace(side.settings, lowercase=True)


def check_separator(tokenizer: Any, separator: str) -> None:
    """Refuse BERT's separator, if the tokenizer does not know it.

    Raises:
        UsageError: with the tokenizer's own separator.
    """
    if BERT_SEPARATOR in separator and BERT_SEPARATOR not in tokenizer.get_vocab():
        own = tokenizer.sep_token or tokenizer.eos_token or " "
        raise UsageError(
            f"--passage_field_separator: this model's tokenizer does not know {BERT_SEPARATOR}, "
            f"the separator of the recipe dpr; pass --passage_field_separator {own!r}"
        )


def freeze_passages(encoder: Encoder) -> None:
    """Train only the query encoder.

    Raises:
        UsageError: queries and passages share one encoder.
    """
    if encoder.untied_query_encoder is None:
        raise UsageError(
            "--fix_ctx_encoder needs separate encoders of queries and passages; add --untie_encoder"
        )
    encoder.requires_grad_(False)
    encoder.untied_query_encoder.requires_grad_(True)
