"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlflow_dr.config import Config, ConfigError, Flag, read_mapping
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES

AnyConfig = TypeVar("AnyConfig", bound=Config)
FILES = click.Path(path_type=Path, exists=True)
RUN = "The MLflow run: its id, the beginning of it, or its name."
FILE_OPTIONS = ("--dataset", "--candidate-dir", "--query-file", "--qrel-file")


class Finite(click.FloatRange):
    """A number in a range; neither NaN, which every range would let pass, nor infinite."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class TakesSeveral(click.Command):
    """A command that takes `--query_files` for `--query-files`, and several values after one flag.

    `--metrics RR@10 nDCG@10` is read as `--metrics RR@10 --metrics nDCG@10`. An argument of the
    command comes before such a flag, because it could be one of its values.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.context_settings = {"token_normalize_func": _dashed, **self.context_settings}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat a flag that may be repeated before each of its values, then parse."""
        has_argument = any(isinstance(param, click.Argument) for param in self.params)
        if has_argument and args and args[0].startswith("-"):
            return super().parse_args(ctx, args)
        options = [param for param in self.params if getattr(param, "multiple", False)]
        names = {name for option in options for name in map(_dashed, option.opts)}
        spread: list[str] = []
        option, values = "", 0
        for word in args:
            if word.startswith("-"):
                option, values = word if _dashed(word) in names else "", 0
            elif option:
                spread += [option] if values else []
                values += 1
            spread.append(word)
        return super().parse_args(ctx, spread)


def _dashed(name: str) -> str:
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
    help="A YAML file with these options by name; what it says goes before other flags.",
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


def flag_of(field: FieldInfo) -> Flag:
    """How a field is given on the command line."""
    return next((found for found in field.metadata if isinstance(found, Flag)), Flag())


def _names(name: str, field: FieldInfo) -> list[str]:
    flag = flag_of(field)
    if flag.positional:
        return [name.upper()]
    return list(dict.fromkeys([*flag.names, f"--{_dashed(name)}"]))


def _parameter(name: str, field: FieldInfo) -> Callable[..., Any]:
    """The click option, or argument, of a field."""
    flag, kind = flag_of(field), _kind(field.annotation)
    if flag.positional:
        count = -1 if kind.multiple else 1
        return click.argument(name, nargs=count, required=field.is_required(), type=kind.type)
    names = _names(name, field)
    help_text = field.description or ""
    if kind.type is click.BOOL:
        names = [f"{names[0]}/{flag.off}" if flag.off else names[0], *names[1:]]
        return click.option(*names, name, is_flag=True, default=None, help=help_text)
    if field.default not in (None, (), PydanticUndefined):
        help_text += f"  [default: {field.default}]"
    return click.option(
        *names,
        name,
        type=kind.type,
        multiple=kind.multiple or flag.several,
        required=field.is_required(),
        default=None,
        help=help_text,
    )


class _Kind(NamedTuple):
    """The click type of a field, and whether the field takes several values."""

    type: Any
    multiple: bool = False


def _kind(annotation: Any) -> _Kind:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return _Kind(_kind(arguments[0]).type, multiple=True)
    if origin is Literal:
        return _Kind(click.Choice(arguments))
    if arguments:  # ... | None
        return _kind(arguments[0])
    types = {bool: click.BOOL, int: click.INT, float: click.FLOAT}
    return _Kind(types.get(annotation, click.STRING))


def _joined(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> str:
    return " ".join(values)


def _whole_path(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """The whole path of a folder, so that it is one for validators in other folders, too."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def _format(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """Our name of a number format."""
    from mlflow_dr.engines.devices import dtype_name

    return dtype_name(name)


def _pooling(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """A pooling that there is."""
    from mlflow_dr.encoder.config import EncoderConfig

    return name if name is None else EncoderConfig(pooling=name).pooling


measures = click.option(
    "--measures",
    "--metrics",
    multiple=True,
    callback=_joined,
    default=(DEFAULT_MEASURES,),
    show_default=True,
    help="What to measure: mrr, ndcg, recall, map, precision, success or accuracy, each @k.",
)
depth = click.option(
    "--depth",
    type=click.IntRange(min=1),
    help="Passages to rank for each query (default: the largest cut-off of the measures).",
)
device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<n>."
)
dtype = click.option(
    "--dtype",
    default="auto",
    callback=_format,
    show_default=True,
    help="auto (bf16 where the hardware multiplies it, else fp32), fp32, bf16 or fp16; also "
    "by PyTorch's names: float32, bfloat16, float16.",
)
keep_own_id = click.option(
    "--keep-own-id",
    is_flag=True,
    help="Keep a passage whose id is the query's id (BEIR's convention leaves it out).",
)
tracking_uri = click.option(
    "--tracking-uri",
    "--tracking_uri",
    help="The tracking server (default: MLFLOW_TRACKING_URI).",
)
seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of what is drawn by lot.",
)


every = click.option(
    "--every", type=click.IntRange(min=1), default=1, help="Only steps that this number divides."
)


def checkpoints_dir(more: str = "") -> Callable[..., Any]:
    """A trainer's directory instead of a run.

    Args:
        more: ends the help's sentence.
    """
    return click.option(
        "--checkpoints-dir",
        "--ckpts_dir",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help=f"Or what a trainer saves here (Tevatron, sentence-transformers, Hugging Face){more}.",
    )


def evaluation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Measures, depth, device, dtype and keep-own-id."""
    for option in (keep_own_id, dtype, device, depth, measures):
        function = option(function)
    return function


def encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What replaces what an encoder's directory says: pooling, normalize, lengths, tokenizer."""
    length = click.IntRange(min=3)
    tokens = "Likewise, tokens of a"
    for option in (
        click.option(
            "--tokenizer",
            "--tokenizer_name_or_path",
            callback=_whole_path,
            help="Take the tokenizer of this directory or hub name instead.",
        ),
        click.option("--p-max-len", "--p_max_len", type=length, help=f"{tokens} passage."),
        click.option("--q-max-len", "--q_max_len", type=length, help=f"{tokens} query."),
        click.option("--max-length", type=length, help="Likewise, tokens of both."),
        click.option("--normalize/--no-normalize", default=None, help="Likewise."),
        click.option(
            "--pooling", callback=_pooling, help="Replaces what the encoder's directory says."
        ),
    ):
        function = option(function)
    return function


subset = click.option(
    "--subset",
    "subsets",
    multiple=True,
    help="Encode only a part of the corpus, and the judged passages: random:N, bm25@K, "
    "ranking:FILE@K, pool:FILE,FILE@K, encoder:NAME@K, rerank:FILE@K, queries:N, full; joined "
    "by +.",
)
judged = click.option(
    "--judged",
    type=click.Choice(("relevant", "all")),
    default="relevant",
    show_default=True,
    help="Which judged passages are always in a subset.",
)


refine = click.option(
    "--refine",
    metavar="SUBSET@N",
    help="Besides, validate the N checkpoints that are best so far on this, such as full@3.",
)
keep_up = click.option(
    "--keep-up",
    is_flag=True,
    help="Of several --subset, take the largest that keeps up with the trainer.",
)


def subset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which part of the corpus is encoded."""
    for option in (seed, judged, subset):
        function = option(function)
    return function


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What follows from the curve: a stop, what is kept, by which metric."""
    for option in (
        click.option(
            "--keep",
            help="Remove the files of all other checkpoints, such as best:3,last:2,every:10000.",
        ),
        click.option(
            "--min-delta",
            "--min_delta",
            type=Finite(min=0),
            default=0.0,
            show_default=True,
            help="A rise by this or less is none.",
        ),
        click.option(
            "--patience",
            type=click.IntRange(min=1),
            help="Ask the training to end when the metric has not risen for so many checkpoints.",
        ),
        click.option(
            "--metric",
            help="What the best are best by, such as val/mrr_at_10 (default: the first measure of "
            "the validation that was begun first).",
        ),
    ):
        function = option(function)
    return function


def encoder_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of `encoder_options` say about the encoder."""
    from mlflow_dr.encoder.config import changes_of

    return changes_of(
        options["pooling"],
        options["normalize"],
        options["q_max_len"] or options["max_length"],
        options["p_max_len"] or options["max_length"],
        options["tokenizer"],
    )


def file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A collection's files, as Asyncval takes them, instead of its name."""
    for option in (
        click.option(
            "--qrel-file",
            "--qrel_file",
            "qrel_files",
            multiple=True,
            type=FILES,
            help="Judgements (TREC or BEIR): one file for all query files, or one for each.",
        ),
        click.option(
            "--query-file",
            "--query_file",
            "--query_files",
            "query_files",
            multiple=True,
            type=FILES,
            help="Queries, likewise; of several files, each is a split of the file's name.",
        ),
        click.option(
            "--candidate-dir",
            "--candidate_dir",
            type=FILES,
            help="Instead of --dataset: a file or folder of passages as JSON lines, text_id and "
            "text, which is a string or token ids; with the next two.",
        ),
    ):
        function = option(function)
    return function


def given_dataset(
    dataset: str | None,
    candidate_dir: Path | None,
    query_files: Sequence[Path],
    qrel_files: Sequence[Path],
) -> tuple[str | None, Sequence[str]]:
    """The dataset by `--dataset` or by `file_options`, and the splits of the latter."""
    from mlflow_dr.collection.asyncval import given_collection

    candidates = [candidate_dir] if candidate_dir else []
    return given_collection(dataset, (candidates, query_files, qrel_files), FILE_OPTIONS)


def run_of_project(tracking_uri: str | None) -> Any:
    """The run that `mlflow run` has made for this command, if it was started by that."""
    if "MLFLOW_RUN_ID" not in os.environ:
        return None  # without mlflow, which takes seconds to import
    from mlflow_dr.tracking.runs import project_run

    return project_run(tracking_uri)


def check_one_set(sets: Sequence[str], split: str | None) -> None:
    """Refuse several query files where one is meant and no split says which."""
    if len(sets) > 1 and not split:
        raise click.UsageError(f"which query file? Choose one: --split {' or '.join(sets)}")
