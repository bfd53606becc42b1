"""Keywords of functions: the fields of a configuration under the names of their flags."""

from __future__ import annotations

import keyword
import os
from collections.abc import Callable, Mapping
from inspect import Parameter, cleandoc, signature
from typing import Any, NamedTuple, TypeVar

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlflow_dr.config import Config, ConfigError, flag_of
from mlflow_dr.errors import UsageError, did_you_mean, quoted

AnyConfig = TypeVar("AnyConfig", bound=Config)
Function = TypeVar("Function", bound=Callable[..., Any])


class Keyword(NamedTuple):
    """What a keyword stands for.

    Attributes:
        field: of the configuration.
        is_opposite: whether the keyword turns a field off that is on by default.
    """

    field: str
    is_opposite: bool = False


def keyword_of(name: str, field: FieldInfo) -> str:
    """The keyword of a field: its first flag, with underscores.

    That of a field that is on by default is the flag that turns it off, such as `once`.
    """
    flag = flag_of(field)
    if flag.off and field.default is True:
        return _as_name(flag.off)
    first = _as_name(flag.names[0]) if flag.names else name
    return name if keyword.iskeyword(first) else first


def known_keywords(model: type[Config]) -> dict[str, Keyword]:
    """What each spelling of a flag of a configuration stands for."""
    known: dict[str, Keyword] = {}
    for name, field in model.model_fields.items():
        flag = flag_of(field)
        known |= dict.fromkeys((name, *map(_as_name, flag.names)), Keyword(name))
        if flag.off:
            known[_as_name(flag.off)] = Keyword(name, is_opposite=True)
    return known


def make_config(
    model: type[AnyConfig], options: Mapping[str, object], /, **fields: object
) -> AnyConfig:
    """A configuration from keywords; None stands for a keyword that is not given.

    Args:
        model: of the configuration.
        options: value by keyword.
        fields: further values, by field.

    Raises:
        UsageError: an unknown keyword, or a value that does not fit.
    """
    known = known_keywords(model)
    values = {name: _plain(value) for name, value in fields.items() if value is not None}
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"there is no keyword {name!r}{did_you_mean(name, known)}")
        if value is not None:
            field, is_opposite = known[name]
            if is_opposite and not isinstance(value, bool):
                raise UsageError(f"{name} is {quoted(value)}; expected True or False")
            values[field] = not value if is_opposite else _plain(value)
    try:
        return model(**values)
    except ConfigError as error:
        name = error.key.partition(".")[0]
        if name not in model.model_fields:
            raise
        shown = keyword_of(name, model.model_fields[name])
        raise UsageError(f"{shown}{error.problem}") from error


def keywords(options: type, model: type[Config]) -> Callable[[Function], Function]:
    """A decorator: show the keywords of a function, their defaults and what they mean, in its help.

    Args:
        options: the TypedDict of its keywords.
        model: the configuration that it makes of them.
    """

    def decorate(function: Function) -> Function:
        own = signature(function)
        named = [each for each in own.parameters.values() if each.kind != Parameter.VAR_KEYWORD]
        shown, lines = [], []
        for name, annotation in options.__annotations__.items():
            field, is_opposite = known_keywords(model)[name]
            about = model.model_fields[field]
            default = False if is_opposite else about.default
            shown.append(
                Parameter(
                    name,
                    Parameter.KEYWORD_ONLY,
                    default=None if default is PydanticUndefined else default,
                    annotation=getattr(annotation, "__forward_arg__", annotation),
                )
            )
            lines.append(f"    {name}: {' '.join((about.description or '').split())}")
        function.__signature__ = own.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
        text = cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([text, "", "Keywords:", *lines])
        return function

    return decorate


def _as_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _plain(value: object) -> object:
    """A value as a configuration takes it: paths as text, sequences as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value
