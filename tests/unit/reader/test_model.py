from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.errors import CheckpointError
from mlflow_dr.reader.model import (
    length_batches,
    load_reader,
    new_reader,
    reader_loss,
    save_reader,
)
from mlflow_dr.training.batches import padded


def test_the_loss_is_dprs_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    relevance = torch.randn(2, 3, generator=generator)
    relevance[1, 2] = -torch.inf
    starts, ends = torch.randn(2, 2, 5, generator=generator)
    spans = torch.tensor([[[0, 1], [3, 4]], [[2, 2], [0, 0]]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = 0.0
    for question in range(2):
        chosen, first, last = (
            values[question].double().softmax(0) for values in (relevance, starts, ends)
        )
        pairs = spans[question][mask[question]].tolist()
        answers = sum(float(first[start] * last[end]) for start, end in pairs)
        expected -= np.log(float(chosen[0])) + np.log(answers)
    loss = reader_loss(relevance, starts, ends, spans, mask)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_no_more_than_a_tenth_of_a_batch_is_padding() -> None:
    lengths = np.random.default_rng(1).integers(20, 350, 200)
    batches = length_batches(lengths, 1024)
    assert sorted(np.concatenate(batches)) == list(range(200))
    computed = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert lengths.sum() / computed > 0.9
    assert all(len(rows) * lengths[rows].max() <= 1024 for rows in batches)


def test_logits_do_not_depend_on_the_other_sequences(make_reader: Callable[[], Any]) -> None:
    rows = [[2, 9, 3, 7, 3, *range(5, 5 + n)] for n in (1, 20, 4)]
    reader = make_reader()
    with torch.inference_mode():
        together = reader(**padded(rows, 0))
        for row, ids in enumerate(rows):
            alone = reader(**padded([ids], 0))
            for mine, theirs in zip(alone[:2], together[:2], strict=True):
                torch.testing.assert_close(mine[0], theirs[row, : len(ids)], rtol=0, atol=1e-5)
                assert torch.isneginf(theirs[row, len(ids) :]).all()
            torch.testing.assert_close(alone[2][0], together[2][row], rtol=0, atol=1e-5)


def test_a_saved_reader_is_loaded_as_it_was(
    make_reader: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    reader = make_reader()
    save_reader(tmp_path / "reader", reader, tokenizer)
    loaded, its_tokenizer = load_reader(str(tmp_path / "reader"))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    state = loaded.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in reader.state_dict().items())


def test_an_encoder_is_no_reader_but_one_begins_with_it(
    make_reader: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    backbone = make_reader().backbone
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is no reader"):
        load_reader(str(tmp_path))
    reader, _ = new_reader(str(tmp_path))
    save_reader(tmp_path / "reader", reader, tokenizer)
    continued, _ = new_reader(str(tmp_path / "reader"))
    assert torch.equal(continued.qa_outputs.weight, reader.qa_outputs.weight)
    own = reader.backbone.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in backbone.state_dict().items())
