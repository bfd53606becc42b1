"""What a user may change about an encoder that is loaded, or before it is trained."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mlflow_dr.encoder.head import changed_head, is_normalized
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError

log = logging.getLogger(__name__)


def changed(encoder: Encoder, changes: Mapping[str, Any]) -> Encoder:
    """An encoder whose settings are replaced, in both towers where there are two.

    Args:
        encoder: gives its backbone and weights.
        changes: fields of `EncoderConfig`.

    Raises:
        UsageError: values that are unknown or do not fit.
    """
    if not changes:
        return encoder
    settings = replace(encoder.settings, **changes)  # checks the values
    head = changed_head(
        encoder.head,
        settings.pooling if "pooling" in changes else None,
        settings.normalize if "normalize" in changes else None,
    )
    tower = encoder.query_tower
    if tower is not None:
        tower = changed(tower, changes)
    return Encoder(encoder.backbone, encoder.tokenizer, settings, tower, head)


def with_projection(encoder: Encoder, in_features: int | None, out_features: int) -> Encoder:
    """An encoder with a linear layer after its pooling.

    One that has a projection already keeps it, as it was trained.

    Args:
        encoder: what to extend.
        in_features: what the layer takes; what the encoder gives when None.
        out_features: what it gives.

    Raises:
        UsageError: `in_features` is not what the encoder gives.
    """
    if encoder.settings.projections:
        log.info(
            "the encoder has a projection to %d dimensions: it is loaded, none is added",
            encoder.dimension,
        )
        return encoder
    from sentence_transformers.sentence_transformer.modules import Dense

    head = list(encoder.head)
    layer = Dense(in_features or encoder.dimension, out_features, activation_function=nn.Identity())
    head.insert(len(head) - is_normalized(head), layer)
    tower = encoder.query_tower
    if tower is not None:
        tower = with_projection(tower, in_features, out_features)
    return Encoder(encoder.backbone, encoder.tokenizer, encoder.settings, tower, head)


def untie(encoder: Encoder) -> None:
    """Give an encoder's queries weights of their own, equal to the passages' at first.

    One that has two towers already stays as it was loaded.
    """
    if encoder.query_tower is not None:
        log.info("both towers were loaded, each with its own weights")
        return
    log.info("one tower was loaded: queries and passages both start from its weights")
    encoder.query_tower = copy.deepcopy(encoder)


def append_eos(tokenizer: Any) -> None:
    """Have a tokenizer end every text with its end-of-sequence token, also after truncation.

    The rule becomes part of the tokenizer, so it is saved with it and nobody has to repeat it.

    Raises:
        UsageError: the tokenizer has no such token, or takes no rules.
    """
    token = tokenizer.eos_token or tokenizer.sep_token
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if token is None:
        raise UsageError("--append_eos_token: the tokenizer has no end-of-sequence token")
    if backend is None:
        raise UsageError("--append_eos_token needs a tokenizer with a tokenizer.json")
    ids = tokenizer("a")["input_ids"]
    token_id = tokenizer.convert_tokens_to_ids(token)
    if ids[-1:] == [token_id]:
        log.info("the tokenizer ends every text with %s already", token)
        return
    rules = json.loads(backend.to_str()).get("post_processor")
    backend.post_processor = _post_processor(_ending_with(rules, token, token_id))


def _ending_with(rules: dict[str, Any] | None, token: str, token_id: int) -> dict[str, Any]:
    """The description of a post-processor, with one more token at the end.

    Its template gets the token where it has one: a second template would take the parts that the
    first one gives, such as a begin token and the text, for two texts.
    """
    rules = rules or {"type": "Sequence", "processors": []}
    steps = rules["processors"] if rules["type"] == "Sequence" else [rules]
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        template = {
            "type": "TemplateProcessing",
            "single": [first],
            "pair": [first, second],
            "special_tokens": {},
        }
        steps = [*steps, template]
    for pieces, kind in ((template["single"], 0), (template["pair"], 1)):
        pieces.append({"SpecialToken": {"id": token, "type_id": kind}})
    template["special_tokens"][token] = {"id": token, "ids": [token_id], "tokens": [token]}
    return {"type": "Sequence", "processors": steps}


def _post_processor(rules: dict[str, Any]) -> Any:
    """A post-processor from its description, which only a whole tokenizer is read from."""
    from tokenizers import Tokenizer, models

    whole = json.loads(Tokenizer(models.WordLevel({}, "")).to_str())
    return Tokenizer.from_str(json.dumps({**whole, "post_processor": rules})).post_processor
