"""Whether an encoder gives the vectors that sentence-transformers gives for the same directory.

Settings that are known to make a difference are refused by name. This catches the others: token
types, a backbone whose vectors depend on padding, whatever a later version adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import Encoder, positions
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.errors import CheckpointError

TEXTS = (
    "Who kept the lighthouse?",
    "The harbour pilot, Ms Ångström, boards EVERY tanker at 6:30 before it enters the channel; "
    "gulls follow the trawlers home because of the offal, and the ferry returns at noon.",
)
TOLERANCE = 1e-4


@torch.inference_mode()
def check_agreement(model: Any, encoder: Encoder, name: object) -> None:
    """Compare the vectors of two texts as queries and as passages.

    Args:
        model: the SentenceTransformer; it encodes the texts one by one, without padding.
        encoder: made of the same modules; it encodes them as one batch.
        name: what an error names.

    Raises:
        CheckpointError: the vectors differ.
    """
    encoder.eval()
    for tower in encoder.towers:
        # beyond its positions a backbone fails, which the library does not prevent
        limit = positions(tower.backbone)
        if limit is not None:
            tower.tokenizer.model_max_length = min(tower.tokenizer.model_max_length, limit)
    pairs = (
        ("query", encoder.for_queries, model.encode_query),
        ("document", encoder, model.encode_document),
    )
    for what, tower, encode in pairs:
        theirs = encode(list(TEXTS), batch_size=1, convert_to_tensor=True, show_progress_bar=False)
        theirs = theirs.float()
        if tower.settings.normalize:
            theirs = torch.nn.functional.normalize(theirs, dim=-1)
        ours = _vectors(tower, what)
        difference = float((ours - theirs).abs().max())
        if difference > TOLERANCE * max(1.0, float(theirs.abs().max())):
            raise CheckpointError(
                f"{name}: the vectors of a {what} differ from sentence-transformers' by "
                f"{difference:.1e}, so the model has a setting that is not supported, such as "
                "token types, padding at the left, or a pooling inside the backbone"
            )


def _vectors(tower: Encoder, what: str) -> Tensor:
    tokenizing = Tokenizing(tower.tokenizer, tower.settings)
    if what == "query":
        rows = tokenizing.query_ids([Query("", text) for text in TEXTS])
    else:
        rows = tokenizing.passage_ids([Passage("", "", text) for text in TEXTS])
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return tower(
        pad_sequence(ids, batch_first=True, padding_value=tokenizing.pad_id),
        pad_sequence(masks, batch_first=True),
    )
