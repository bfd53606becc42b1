"""Configurations: one pydantic model per command, for flags, YAML files and Python alike.

    class ShowConfig(Config):
        run_id: str
        \"\"\"The run to show.\"\"\"
        top_k: Annotated[int, Flag("--depth"), Field(ge=1)] = 10
        \"\"\"Passages to show.\"\"\"

The field `top_k` is the flag `--depth`, `--top-k` or `--top_k`, the key `top_k` of a file, and the
argument `top_k` of `ShowConfig(...)`. Its docstring is the help text of the
flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mlflow_dr.errors import MlflowDrError, UsageError, did_you_mean, quoted
from mlflow_dr.terminal import one_line_of

# the expected values, by the type of pydantic's error
EXPECTED = {
    "bool_type": "true or false, without quotation marks",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "path_type": "a path",
    "too_long": "at most {max_length}",
    "too_short": "at least {min_length}",
    "string_type": "text",
}


class Flag:
    """How a field is given on the command line, beside `--its-name` and `--its_name`.

    Args:
        names: other names; the first one stands in the help.
        off: the flag that sets a boolean field to false.
        positional: whether it is an argument without a flag.
        several: whether a text field takes several words.
        in_file_only: whether the command line does not have it.
    """

    def __init__(
        self,
        *names: str,
        off: str = "",
        positional: bool = False,
        several: bool = False,
        in_file_only: bool = False,
    ) -> None:
        self.names = names
        self.off = off
        self.positional = positional
        self.several = several
        self.in_file_only = in_file_only


def flag_of(field: FieldInfo) -> Flag:
    """How a field is given on the command line."""
    return next((flag for flag in field.metadata if isinstance(flag, Flag)), Flag())


class ConfigError(UsageError):
    """A value of a configuration is wrong.

    Args:
        key: of the value; empty for the configuration as a whole.
        problem: what is wrong with it, as the end of a sentence that begins with the key.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}{problem}")
        self.key = key
        self.problem = problem


class Config(BaseModel):
    """Base of all configurations: frozen, without unknown keys, its values checked.

    Raises:
        ConfigError: a value is missing, unknown, of another type or out of range.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error.errors(include_url=False)[0], type(self)) from error

    def replaced(self, **values: Any) -> Self:
        """The same configuration with other values for some fields, checked again."""
        return type(self)(**{**self.given(), **values})

    def given(self) -> dict[str, Any]:
        """The values that are not left to their defaults, by field."""
        return {key: getattr(self, key) for key in sorted(self.model_fields_set)}


def checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A pydantic validator of a value that one of our functions refuses with a UsageError."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except MlflowDrError as error:
            raise ValueError(str(error)) from error
        return value

    return validate


def as_tuple(value: Any) -> Any:
    """A list, or a value by itself, as a tuple; for fields that take several values."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str | Path | int) else value


@contextmanager
def within(key: str) -> Iterator[None]:
    """Name the key of the part of a configuration that a UsageError is about.

    Raises:
        ConfigError: instead of the error that was raised.
    """
    try:
        yield
    except ConfigError as error:
        joint = "." if error.key else ": "
        raise ConfigError(key, f"{joint}{error.key}{error.problem}") from error
    except UsageError as error:
        raise ConfigError(key, f": {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; JSON is YAML, too.

    Raises:
        UsageError: it cannot be read, is no YAML, or holds no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a YAML file: not UTF-8 text ({error.reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a YAML file: {one_line_of(str(error), 200)}") from error
    return string_keys(values, str(path))


def string_keys(values: Any, location: str) -> dict[str, Any]:
    """A mapping with its keys as text.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(location, f" is {quoted(values)}; expected keys with values")
    return {str(key): value for key, value in values.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {repeated[0]!r} stands twice in the mapping of line {line}")
        return super().construct_mapping(node, deep)


def _config_error(details: ErrorDetails, model: type[Config]) -> ConfigError:
    """One line from the first error of pydantic's list."""
    location = details["loc"]
    key = str(location[0]) if location else ""
    if details["type"] == "extra_forbidden":
        names = list(model.model_fields)
        near = did_you_mean(key, names) or ";"
        return ConfigError("", f"no key {quoted(key)}{near} known are {', '.join(names)}")
    if details["type"] == "missing":
        return ConfigError(key, " is missing")
    if details["type"] == "value_error":
        return ConfigError(
            key, f": {details['ctx']['error']}" if key else str(details["ctx"]["error"])
        )
    expected = EXPECTED.get(details["type"])
    problem = expected.format(**details.get("ctx", {})) if expected else details["msg"]
    return ConfigError(key, f" is {quoted(details['input'])}; expected {problem}")
