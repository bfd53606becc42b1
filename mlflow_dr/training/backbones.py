"""What training flags change about a loaded encoder's backbones: dropout, case, frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError

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
    for tower in encoder.towers:
        for part in (tower.backbone.config, *tower.backbone.modules()):
            for name in DROPOUTS:
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, probability)
            if isinstance(part, nn.Dropout):
                part.p = probability


def lower_case(encoder: Encoder) -> None:
    """Have all texts lower-cased; a tokenizer that does it already is left alone."""
    for tower in encoder.towers:
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
    if encoder.query_tower is None:
        raise UsageError(
            "--fix_ctx_encoder leaves nothing to train where queries and passages have one "
            "encoder; add --untie_encoder"
        )
    encoder.requires_grad_(False)
    encoder.query_tower.requires_grad_(True)
