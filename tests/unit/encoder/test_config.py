"""The encoder's settings: what is refused, and the way to JSON and back."""

import json
from typing import Any

import pytest

from mlflow_dr.encoder.config import EncoderConfig, ProjectionConfig
from mlflow_dr.errors import UsageError

FULL = EncoderConfig(
    pooling="last",
    normalize=True,
    projections=(ProjectionConfig(8, 4, bias=False, activation="tanh"), ProjectionConfig(4, 2)),
    query_prompt="q: ",
    passage_prompt="p: ",
    query_max_length=7,
    passage_max_length=9,
    title_separator=" | ",
    lowercase=True,
)


@pytest.mark.parametrize("config", [FULL, EncoderConfig()], ids=["full", "default"])
def test_there_and_back_through_json(config: EncoderConfig) -> None:
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling": "middle"}, "pooling 'middle': expected one of cls, mean"),
        ({"query_max_length": 2}, "query_max_length is 2; at least 3"),
        ({"passage_max_length": 0}, "passage_max_length is 0; at least 3"),
        ({"normalise": True, "size": 3}, r"unknown encoder settings \['normalise', 'size'\]"),
        (
            {"projections": [{"in_features": 2, "out_features": 1, "activation": "step"}]},
            "activation 'step': expected one of identity, tanh",
        ),
        ({"normalize": "no"}, "normalize is 'no'; expected a value of type bool"),
        ({"lowercase": 0}, "lowercase is 0; expected a value of type bool"),
        ({"query_max_length": "32"}, "query_max_length is '32'; expected a value of type int"),
        ({"passage_max_length": True}, "passage_max_length is True; expected a value of type int"),
        ({"query_prompt": None}, "query_prompt is None; expected a value of type str"),
        (
            {"projections": [{"in_features": 2, "out_features": 1, "bias": "false"}]},
            "bias is 'false'; expected a value of type bool",
        ),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncoderConfig.from_dict(values)
