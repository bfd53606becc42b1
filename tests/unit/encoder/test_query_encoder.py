"""Queries with weights of their own: one directory for us and for sentence-transformers."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError

QUERIES = ["which fish is red", "what is a reef"]
PASSAGES = ["A red fish lives here.", "A reef is a ridge of rock under the sea."]


@pytest.fixture
def untied_encoder(make_untied_encoder) -> Encoder:
    return make_untied_encoder(query_prompt="ask: ")


def vectors(encoder: Encoder, rows: list[list[int]]) -> Tensor:
    ids = [torch.tensor([row]) for row in rows]
    with torch.no_grad():
        return torch.cat([encoder(row, torch.ones_like(row)) for row in ids])


def both(encoder: Encoder) -> tuple[Tensor, Tensor]:
    query_encoder = encoder.query_encoder
    queries = [Query(str(i), text) for i, text in enumerate(QUERIES)]
    passages = [Passage(str(i), "", text) for i, text in enumerate(PASSAGES)]
    return (
        vectors(
            query_encoder,
            TextTokenizer.of(query_encoder).query_ids(queries),
        ),
        vectors(encoder, TextTokenizer.of(encoder).passage_ids(passages)),
    )


def test_both_encoders_are_saved_and_loaded(untied_encoder: Encoder, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", untied_encoder)
    for got, expected in zip(
        both(load_encoder(tmp_path / "encoder")), both(untied_encoder), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_sentence_transformers_uses_the_encoder_of_each_task(
    untied_encoder: Encoder, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "encoder", untied_encoder)
    peer = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    queries, passages = both(untied_encoder)
    got = torch.from_numpy(peer.encode_query(QUERIES))
    torch.testing.assert_close(got, queries, rtol=0, atol=1e-6)
    got = torch.from_numpy(peer.encode_document(PASSAGES))
    torch.testing.assert_close(got, passages, rtol=0, atol=1e-6)
    as_passages = TextTokenizer.of(untied_encoder)
    rows = as_passages.query_ids([Query(text, text) for text in QUERIES])
    swapped = vectors(untied_encoder, rows)
    assert (queries - swapped).abs().max() > 1e-3  # the encoders differ


def test_encoders_of_different_dimensions_are_refused(untied_encoder: Encoder, make_tiny) -> None:
    other = make_tiny()
    with pytest.raises(UsageError, match="both need the same"):
        Encoder(other.backbone, other.tokenizer, other.settings, untied_encoder)
