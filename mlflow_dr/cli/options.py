"""Options of commands, made of the fields of their configurations."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlflow_dr.config import Config, ConfigError, flag_of, read_mapping
from mlflow_dr.errors import UsageError

AnyConfig = TypeVar("AnyConfig", bound=Config)


class TakesSeveral(click.Command):
    """A command that takes `--query_files` for `--query-files`, and several values after one flag.

    `--metrics RR@10 nDCG@10` is read as `--metrics RR@10 --metrics nDCG@10`. An argument of the
    command comes before such a flag, because it could be one of its values.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.context_settings = {"token_normalize_func": with_dashes, **self.context_settings}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat a flag that may be repeated before each of its values, then parse."""
        # flags that are handed on are no argument that could be taken for a value
        has_argument = any(
            isinstance(param, click.Argument) and param.type is not click.UNPROCESSED
            for param in self.params
        )
        if has_argument and args and args[0].startswith("-"):
            return super().parse_args(ctx, args)
        options = [param for param in self.params if getattr(param, "multiple", False)]
        names = {name for option in options for name in map(with_dashes, option.opts)}
        spread: list[str] = []
        option, values = "", 0
        for word in args:
            if word.startswith("-"):
                option, values = word if with_dashes(word) in names else "", 0
            elif option:
                spread += [option] if values else []
                values += 1
            spread.append(word)
        return super().parse_args(ctx, spread)


def with_dashes(name: str) -> str:
    """The name of a flag with dashes for underscores."""
    return name.replace("_", "-")


def takes(
    model: type[Config], has_file: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: make an option of each field, and call the function with the configuration.

    Other options of the command are passed on to the function by name.

    Args:
        model: of the configuration.
        has_file: whether `--config` names a YAML file of the same fields.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_config(**values: Any) -> Any:
            fields = {name: values.pop(name) for name in model.model_fields if name in values}
            path = values.pop("config", None) if has_file else None
            return function(from_flags(model, fields, path), **values)

        # the fields of the model itself come first in the help, then those that it inherits
        names = [name for base in model.__mro__ for name in vars(base).get("__annotations__", ())]
        for name in reversed([name for name in dict.fromkeys(names) if name in model.model_fields]):
            field = model.model_fields[name]
            if not flag_of(field).in_file_only:
                with_config = _parameter(name, field)(with_config)
        return CONFIG_OPTION(with_config) if has_file else with_config

    return decorate


CONFIG_OPTION = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A YAML file with these options by name; its values replace those of flags.",
)


def from_flags(
    model: type[AnyConfig], values: Mapping[str, Any], path: Path | None = None
) -> AnyConfig:
    """A configuration from the values of flags; None and an empty tuple stand for no flag.

    Args:
        model: of the configuration.
        values: by field.
        path: a YAML file whose values go before those of the flags.

    Raises:
        UsageError: with the name of the flag, or the file and the key.
    """
    given = {name: value for name, value in values.items() if value not in (None, ())}
    in_file = read_mapping(path) if path else {}
    try:
        return model(**{**given, **in_file})
    except ConfigError as error:
        name = error.key.partition(".")[0]
        if path and (name in in_file or name not in given):
            raise UsageError(f"{path}: {error}") from error
        field = model.model_fields.get(name)
        shown = _names(name, field)[0] if field else error.key
        raise UsageError(f"{shown}{error.problem}") from error


def _names(name: str, field: FieldInfo) -> list[str]:
    flag = flag_of(field)
    if flag.positional:
        return [name.upper()]
    return list(dict.fromkeys([*flag.names, f"--{with_dashes(name)}"]))


def _parameter(name: str, field: FieldInfo) -> Callable[..., Any]:
    """The click option, or argument, of a field."""
    flag, (kind, multiple) = flag_of(field), _click_type(field.annotation)
    complete = complete_paths if name in NAMES_OR_PATHS else None
    if flag.positional:
        count = -1 if multiple else 1
        required = field.is_required()
        return click.argument(
            name, nargs=count, required=required, type=kind, shell_complete=complete
        )
    names = _names(name, field)
    help_text = field.description or ""
    if kind is click.BOOL:
        names = [f"{names[0]}/{flag.off}" if flag.off else names[0], *names[1:]]
        return click.option(*names, name, is_flag=True, default=None, help=help_text)
    if field.default not in (None, (), PydanticUndefined):
        help_text += f"  [default: {field.default}]"
    return click.option(
        *names,
        name,
        type=kind,
        multiple=multiple or flag.several,
        required=field.is_required(),
        default=None,
        help=help_text,
        shell_complete=complete,
    )


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """The click type of a field, and whether the field takes several values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return _click_type(arguments[0])[0], True
    if origin is Literal:
        return click.Choice(arguments), False
    if arguments:  # Annotated, or ... | None
        return _click_type(arguments[0])
    types: dict[Any, click.ParamType[Any]] = {
        bool: click.BOOL,
        int: click.INT,
        float: click.FLOAT,
        Path: click.Path(),
    }
    return types.get(annotation, click.STRING), False


NAMES_OR_PATHS = ("dataset", "encoder", "operands", "model", "tokenizer")


def complete_paths(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Files and folders, for the completion of a shell; collections, too, for a dataset."""
    names: list[str] = []
    if parameter.name == "dataset":
        from mlflow_dr.collection.catalogue import ENTRIES

        names = [entry.name for entry in ENTRIES if entry.name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def check_trainer_flags(flags: Sequence[str]) -> None:
    """Refuse flags that the current command would hand on in vain, before seconds of imports.

    Raises:
        UsageError: a flag that training does not have; near ones of this command are suggested.
    """
    from mlflow_dr.training.flags import check_flags

    parameters = click.get_current_context().command.params
    check_flags(flags, [name for parameter in parameters for name in parameter.opts])


def find_project_run(tracking_uri: str | None) -> Any:
    """The run that `mlflow run` has made for this command; None if another way started it."""
    if "MLFLOW_RUN_ID" not in os.environ:
        return None  # without mlflow, which takes seconds to import
    from mlflow_dr.tracking.runs import project_run

    return project_run(tracking_uri)
