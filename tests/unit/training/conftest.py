from collections.abc import Callable

import pytest

from mlflow_dr.encoder.model import Encoder


@pytest.fixture
def tiny(make_tiny: Callable[..., Encoder]) -> Encoder:
    """A fresh encoder of few weights."""
    return make_tiny(pooling="mean", normalize=True, passage_max_length=64)
