"""Every pooling against a plain loop over the tokens of each text."""

import math

import pytest
import torch
from torch import Tensor

from mlflow_dr.encoder.config import POOLINGS
from mlflow_dr.encoder.model import TOKENS, apply_head, pooling_module

LENGTHS = (1, 4, 7, 7)


def plain(name: str, tokens: list[list[float]]) -> list[float]:
    """The vector of one text, computed from its token vectors number by number."""
    columns = list(zip(*tokens, strict=True))
    n = len(tokens)
    match name:
        case "cls":
            return tokens[0]
        case "last":
            return tokens[-1]
        case "max":
            return [max(column) for column in columns]
        case "mean":
            return [sum(column) / n for column in columns]
        case "mean_sqrt_len":
            return [sum(column) / math.sqrt(n) for column in columns]
        case "weighted_mean":
            weights = range(1, n + 1)
            return [
                sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
                for column in columns
            ]
    raise AssertionError(name)


@pytest.fixture
def states() -> Tensor:
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(3)) - 1.5


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()


def pooled(name: str, states: Tensor, mask: Tensor) -> Tensor:
    head = [pooling_module(name, states.shape[-1])]
    return apply_head(head, {TOKENS: states, "attention_mask": mask})


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings_equal_a_plain_loop(name: str, states: Tensor, mask: Tensor) -> None:
    expected = [
        plain(name, text[:length].tolist()) for text, length in zip(states, LENGTHS, strict=True)
    ]
    torch.testing.assert_close(pooled(name, states, mask), torch.tensor(expected))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("filling", [1e4, -1e4])
def test_padding_does_not_matter(name: str, filling: float, states: Tensor, mask: Tensor) -> None:
    filled = states.masked_fill(mask[:, :, None] == 0, filling)
    longer = torch.cat([filled, torch.full((4, 3, 5), filling)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(4, 3, dtype=mask.dtype)], dim=1)
    torch.testing.assert_close(pooled(name, longer, longer_mask), pooled(name, states, mask))


def test_several_poolings_are_concatenated(states: Tensor, mask: Tensor) -> None:
    both = torch.cat([pooled("cls", states, mask), pooled("mean", states, mask)], dim=1)
    torch.testing.assert_close(pooled("cls+mean", states, mask), both)


def test_sums_are_in_fp32_for_all_backbones(mask: Tensor) -> None:
    # 4096 + 1 is 4096 in bf16: summed there, the small tokens would vanish
    states = torch.ones(4, 7, 5, dtype=torch.bfloat16)
    states[:, 0] = 4096
    vectors = pooled("mean", states, mask)
    assert vectors.dtype == torch.float32
    assert vectors[:, 0].tolist() == pytest.approx([(4096 + n - 1) / n for n in LENGTHS])
