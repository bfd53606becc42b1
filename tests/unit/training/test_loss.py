import math

import pytest
import torch

from mlflow_dr.training.loss import contrastive_loss


@pytest.mark.parametrize("n_passages", [1, 3])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_loss_is_the_mean_negative_log_softmax_of_the_positive(
    n_passages: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    passages = torch.randn(4 * n_passages, 8, generator=generator, dtype=torch.float64)
    total = 0.0
    for index, query in enumerate(queries):
        scores = [float(query @ passage) / temperature for passage in passages]
        best = max(scores)
        total += math.log(sum(math.exp(s - best) for s in scores)) + best
        total -= scores[index * n_passages]
    loss = float(contrastive_loss(queries, passages, temperature))
    assert loss == pytest.approx(total / 4, rel=1e-5)


def test_loss_in_bf16_is_computed_in_fp32() -> None:
    vectors = torch.eye(4, dtype=torch.bfloat16)
    assert contrastive_loss(vectors, vectors, 0.05).dtype == torch.float32
