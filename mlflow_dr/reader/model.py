"""DPR's reader: a backbone, the start and end of answers, and the relevance of passages.

Source: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020,
section 6.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from mlflow_dr import compat
from mlflow_dr.encoder.checks import checkpoint_errors
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.files import grant_umask_modes
from mlflow_dr.retrieval.encode import TOKENS_PER_BATCH
from mlflow_dr.tracking.encoders import local_encoder, open_encoder
from mlflow_dr.tracking.mlmodel import is_reader

LONGER = 1.1
"""Longest over shortest sequence of a batch; so at least 91 % of its tokens are no padding."""
INITIAL_SPREAD = 0.02


class ReaderSource:
    """The weights of a reader that is trained, for the publisher.

    Args:
        reader: the reader.
        tokenizer: the reader's.
    """

    def __init__(self, reader: ExtractiveReader, tokenizer: Any) -> None:
        self.reader = reader
        self.tokenizer = tokenizer

    def state(self) -> Mapping[str, Tensor]:
        """The reader's weights."""
        return self.reader.state_dict()

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write a directory that `load_reader` reads."""
        save_reader(directory, self.reader, self.tokenizer, state)


class ReaderLogits(NamedTuple):
    """What a reader says on sequences; all fp32.

    Attributes:
        starts: of each token as the first of an answer, `(n, length)`; -inf for padding.
        ends: of each token as the last, `(n, length)`; -inf for padding.
        relevance: of each passage, `(n,)`.
    """

    starts: Tensor
    ends: Tensor
    relevance: Tensor


@compat.with_attention_of_backbone
class ExtractiveReader(PreTrainedModel):
    """A backbone with two linear layers. Its directory is the backbone's, with the layers' weights.

    Args:
        config: the backbone's. With `segment_separator`, the id of [SEP], tokens after the first
            [SEP] have segment id 1, as in DPR since 2021; without it all have 0.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        from mlflow_dr.encoder.backbone import has_unused_pooler

        options = {"add_pooling_layer": False} if has_unused_pooler(config) else {}
        self.backbone = AutoModel.from_config(config, **options)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.qa_classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ReaderLogits:
        """Logits of sequences, which are read in batches of similar lengths.

        Args:
            input_ids: `(n, length) int64`, padded at the right.
            attention_mask: 1 for a token, 0 for padding, `(n, length)`.
        """
        lengths = attention_mask.sum(dim=1).cpu().numpy()
        batches = length_batches(lengths, TOKENS_PER_BATCH[input_ids.device.type])
        longest = input_ids.shape[1]
        # looked up once: each lookup has a gradient of the size of the vocabulary
        embeddings = self.get_input_embeddings()(input_ids) if torch.is_grad_enabled() else None
        separator = getattr(self.config, "segment_separator", None)
        segments = None if separator is None else segment_ids(input_ids, separator)
        parts = []
        for rows in batches:
            some = torch.from_numpy(rows).to(input_ids.device)
            width = max(1, int(lengths[rows].max()))
            mask = attention_mask[some, :width]
            tokens = (
                {"input_ids": input_ids[some, :width]}
                if embeddings is None
                else {"inputs_embeds": embeddings[some, :width]}
            )
            if segments is not None:
                tokens["token_type_ids"] = segments[some, :width]
            states = self.backbone(**tokens, attention_mask=mask).last_hidden_state
            with torch.autocast(input_ids.device.type, enabled=False):  # logits in fp32
                states = states.float()
                spans = self.qa_outputs(states).masked_fill(mask[..., None] == 0, -torch.inf)
                relevance = self.qa_classifier(states[:, 0])[:, 0]
            spans = functional.pad(spans, (0, 0, 0, longest - width), value=-torch.inf)
            parts.append((spans, relevance))
        order = torch.from_numpy(np.argsort(np.concatenate(batches))).to(input_ids.device)
        all_spans, all_relevance = (torch.cat(some)[order] for some in zip(*parts, strict=True))
        return ReaderLogits(all_spans[..., 0], all_spans[..., 1], all_relevance)


def segment_ids(input_ids: Tensor, separator: int) -> Tensor:
    """0 up to the first separator of each sequence, then 1, `(n, length) int64`."""
    is_separator = (input_ids == separator).long()
    return (is_separator.cumsum(dim=1) - is_separator).clamp(max=1)


def length_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows in batches of similar lengths, the longest first.

    Args:
        lengths: tokens of each row, `(n,)`.
        max_tokens: rows x longest row of a batch; a single row may exceed it.

    Returns:
        Row numbers of each batch, `(n_in_batch,) int64`; each row is in exactly one.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        room = order[start : start + max(1, max_tokens // longest)]
        count = int((lengths[room] * LONGER >= longest).sum()) or 1
        batches.append(order[start : start + count])
        start += count
    return batches


def reader_loss(
    relevance: Tensor, starts: Tensor, ends: Tensor, spans: Tensor, span_mask: Tensor
) -> Tensor:
    """The sum over questions of two negative log-likelihoods: of the positive, and of its answers.

    Args:
        relevance: of each question's passages, the positive first, `(n_questions, n_passages)`;
            -inf where a question has fewer.
        starts: logits of the positive's tokens, `(n_questions, length)`.
        ends: the same.
        spans: first and last token of each answer, `(n_questions, n_spans, 2) int64`.
        span_mask: whether it is an answer, `(n_questions, n_spans) bool`; one at least is.

    Returns:
        A number. The likelihood of the answers is the sum over all of their places.
    """
    chosen = functional.log_softmax(relevance, dim=1)[:, 0]
    scores = functional.log_softmax(starts, dim=1).gather(1, spans[..., 0])
    scores = scores + functional.log_softmax(ends, dim=1).gather(1, spans[..., 1])
    answers = scores.masked_fill(~span_mask, -torch.inf).logsumexp(dim=1)
    return -(chosen + answers).sum()


def new_reader(name: str, tracking_uri: str | None = None) -> tuple[ExtractiveReader, Any]:
    """A reader to train, and its tokenizer; the layers on a backbone are new and random.

    Args:
        name: a reader, an encoder or a bare backbone: a directory, a hub name, or `models:/...`.
        tracking_uri: the server of `models:/`.

    Raises:
        UsageError: no encoder has this name, or it has no transformer.
        CheckpointError: its files are damaged or missing.
    """
    with local_encoder(name, tracking_uri) as directory:
        if is_reader(Path(directory)):
            return load_reader(directory)
        encoder = open_encoder(directory, label=name, bare_pooling="cls")
    if not isinstance(encoder.backbone, PreTrainedModel):
        raise UsageError(f"{name}: has no transformer to read with; choose another model")
    reader = ExtractiveReader(encoder.backbone.config)
    reader.backbone = encoder.backbone
    for layer in (reader.qa_outputs, reader.qa_classifier):
        nn.init.normal_(layer.weight, std=INITIAL_SPREAD)
        nn.init.zeros_(layer.bias)
    return reader, encoder.tokenizer


def save_reader(
    directory: Path,
    reader: ExtractiveReader,
    tokenizer: Any,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a reader with its tokenizer: configuration and safetensors.

    Args:
        directory: it may exist.
        reader: the reader.
        tokenizer: the reader's.
        state: weights to write instead of the reader's own.
    """
    from mlflow_dr.encoder.backbone import quiet_transformers

    with quiet_transformers():
        reader.save_pretrained(directory, state_dict=dict(state) if state else None)
        tokenizer.save_pretrained(directory)
    grant_umask_modes(directory)


def open_reader(name: str, tracking_uri: str | None = None) -> tuple[ExtractiveReader, Any]:
    """As `load_reader`; the name may also be `models:/...` of a published reader.

    Raises:
        TrackingError: no such model, or no server.
    """
    with local_encoder(name, tracking_uri) as directory:
        return load_reader(directory)


def load_reader(name: str) -> tuple[ExtractiveReader, Any]:
    """A reader in fp32 on the processor, and its tokenizer.

    Args:
        name: a directory that `save_reader` wrote, or a hub name.

    Raises:
        UsageError: no model has this name.
        CheckpointError: it is no reader, or its files are damaged.
    """
    from mlflow_dr.encoder.backbone import loading_alone, quiet_transformers

    directory = encoder_directory(name)
    with checkpoint_errors(directory), quiet_transformers(), loading_alone():
        if not is_reader(directory):
            raise CheckpointError(
                f"{directory}: is no reader; train one by `mlflow-dr reader-train`, or import one "
                "of DPR by `mlflow-dr import`"
            )
        config = AutoConfig.from_pretrained(directory)
        loaded: Any = ExtractiveReader.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        reader, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise CheckpointError(f"{directory}: has no weights of {missing[0]}; get it again")
        return reader.eval(), AutoTokenizer.from_pretrained(directory)
