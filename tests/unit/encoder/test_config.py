"""The encoder's settings: what is refused."""

from typing import Any

import pytest

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.errors import UsageError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling": "middle"}, "pooling 'middle': expected one of cls, mean"),
        ({"query_max_length": 2}, "query_max_length is 2; at least 3"),
        ({"passage_max_length": 0}, "passage_max_length is 0; at least 3"),
        ({"normalize": "no"}, "normalize is 'no'; expected a value of type bool"),
        ({"lowercase": 0}, "lowercase is 0; expected a value of type bool"),
        ({"query_max_length": "32"}, "query_max_length is '32'; expected a value of type int"),
        ({"passage_max_length": True}, "passage_max_length is True; expected a value of type int"),
        ({"query_prompt": None}, "query_prompt is None; expected a value of type str"),
        ({"pooling": "mean+middle"}, r"pooling 'mean\+middle': expected one of cls, mean"),
    ],
)
def test_refused_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncoderConfig(**values)
