"""Configurations of validators, as tests write them."""

from typing import Any

from mlflow_dr.validation.config import ValidateConfig

VALIDATION = {"measures": "mrr@10", "device": "cpu", "dtype": "fp32"}


def configured(*validations: dict[str, Any], **fields: Any) -> ValidateConfig:
    """A configuration of these validations, each a mapping that may have a `name`."""
    named = {
        values.get("name", "val"): {key: value for key, value in values.items() if key != "name"}
        for values in validations
    }
    return ValidateConfig(validations=named, **fields)
