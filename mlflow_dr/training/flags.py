"""Names, ranges and choices of all training flags, without importing torch or transformers.

So a mistyped flag is refused within a second; importing torch and transformers takes five.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlflow_dr.encoder.config import POOLINGS, SHORTEST
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.extensions import Registry

OWN_SOURCES = ("arguments.py", "gc_dpr.py")
HF_CLASS = "TrainingArguments"
PARSER_FLAGS = ("--config", "--help", "-h")
HELP = "`mlflow-dr train --help` lists all"


def flag(default: Any, help: str, *aliases: str, **options: Any) -> Any:
    """A dataclass field for HfArgumentParser; aliases are spelled with dashes or underscores."""
    spellings = dict.fromkeys(s for name in aliases for s in (name, dashed(name)))
    return field(default=default, metadata={"help": help, "aliases": list(spellings), **options})


def dashed(name: str) -> str:
    """A flag's name with dashes instead of underscores."""
    return "--" + name.removeprefix("--").replace("_", "-")


def check_flags(argv: Sequence[str], others: Iterable[str] = ()) -> None:
    """Refuse unknown flags, and values that are not among the choices of a flag.

    Args:
        argv: the flags of `mlflow-dr train`; flags in a `--config` file are checked, too.
        others: names of further flags of the command, for suggestions.

    Raises:
        UsageError: a flag or value is unknown, or the `--config` file cannot be read.
    """
    flags = known_flags()
    if not flags:
        return
    for word in argv:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name != "--" and name not in flags:
            raise UsageError(unknown_flag(name, [*flags, *others]))
    for name, value in flag_values(argv):
        field_name = name.removeprefix("--").replace("-", "_")
        check_choices({field_name: value}, {field_name: name}.__getitem__)
        if name == "--config":
            read_flags(Path(value), flags)


def flag_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The flags with a value, as they are typed, and their values."""
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif position + 1 < len(argv) and not argv[position + 1].startswith("--"):
            yield name, argv[position + 1]


def read_flags(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Flags and values of a YAML or JSON file; names get `--` and underscores.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or has an unknown flag.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UsageError(
            f"{path}: expected a mapping of flags to values, got {type(values).__name__}"
        )
    names = {key: f"--{str(key).replace('-', '_')}" for key in values}
    for name in names.values():
        if name not in known or name in PARSER_FLAGS:
            raise UsageError(f"{path}: {unknown_flag(name, known)}")
    return {names[key]: value for key, value in values.items()}


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """The message about an unknown flag, with the most similar known one."""
    name = word.split("=", 1)[0][:80]
    spelled = name.replace("-", "_").replace("__", "--", 1)
    close = difflib.get_close_matches(spelled, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    kind = "flag" if name.startswith("-") else "argument"
    return f"unknown {kind} {name}{hint} {HELP}"


@cache
def known_flags() -> frozenset[str]:
    """Every spelling of every training flag; empty if transformers' source is not found."""
    package = importlib.util.find_spec("transformers")
    directories = (package and package.submodule_search_locations) or []
    sources = [Path(directory) / "training_args.py" for directory in directories]
    if not sources or not sources[0].is_file():
        return frozenset()
    files = [sources[0], *(Path(__file__).with_name(name) for name in OWN_SOURCES)]
    field_nodes: dict[str, ast.expr | None] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                field_nodes |= _fields(node, every=node.name == HF_CLASS)
    names = {
        spelling for name, value in field_nodes.items() for spelling in _spellings(name, value)
    }
    return frozenset({*names, *PARSER_FLAGS})


def _fields(node: ast.ClassDef, every: bool) -> dict[str, ast.expr | None]:
    """The fields of a dataclass that are flags: all if `every`, else those that `flag` makes."""
    return {
        line.target.id: line.value
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if every or _is_call(line.value, "flag")
    }


def _spellings(name: str, value: ast.expr | None) -> Iterator[str]:
    yield from (f"--{name}", dashed(name))
    default = value
    if isinstance(value, ast.Call):
        strings = (node.value for node in value.args[2:] if isinstance(node, ast.Constant))
        for alias in strings if _is_call(value, "flag") else ():
            yield from (str(alias), dashed(str(alias)))
        named = [word.value for word in value.keywords if word.arg == "default"]
        default = next(iter([*named, *value.args[:1]]), None)
    if (
        isinstance(default, ast.Constant) and default.value is True
    ):  # HfArgumentParser adds the opposite
        yield from (f"--no_{name}", f"--no-{name.replace('_', '-')}")


def _is_call(value: ast.expr | None, name: str) -> bool:
    return (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == name
    )


LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
SEEDS = ("seed", "data_seed")
LONGEST_SHOWN = 40
RECIPE_NAMES = ("demo", "msmarco", "judged", "tevatron", "dpr")
MERGED, ADAPTER = "merged", "adapter"
OWN_LOSSES = ("contrastive", "distillation")

losses: Registry[Any] = Registry("loss", "mlflow_dr.losses")
"""Losses by name, see `mlflow_dr.training.loss.Loss`; here, because importing that takes long."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "pooling": tuple(POOLINGS),
    "lora_publish": (MERGED, ADAPTER),
    "recipe": RECIPE_NAMES,
    "encoder_model_type": ("hf_bert", "pytext_bert", "fairseq_roberta"),
}


class Range(NamedTuple):
    """The values that a number may have; NaN is in no range.

    Attributes:
        text: the range, as it follows "it must be ".
        contains: whether a number is in it.
    """

    text: str
    contains: Callable[[float], bool]


def at_least(lowest: int) -> Range:
    """Numbers that are `lowest` or more."""
    return Range(f"at least {lowest}", lambda value: value >= lowest)


POSITIVE = Range("above 0", lambda value: value > 0)
COUNT = at_least(1)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
STEPS = Range("at least 1, or -1 for whole epochs", lambda value: value >= 1 or value == -1)

RANGES: Mapping[str, Range] = {
    "learning_rate": at_least(0),
    "weight_decay": at_least(0),
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": at_least(0),
    "num_train_epochs": POSITIVE,
    "max_steps": STEPS,
    "warmup_steps": at_least(0),
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "save_total_limit": at_least(0),
    "seed": at_least(0),
    "data_seed": at_least(0),
    "label_smoothing_factor": BELOW_ONE,
    "dataloader_num_workers": at_least(0),
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "temperature": POSITIVE,
    "distil_weight": SHARE,
    "distil_temperature": POSITIVE,
    "gc_q_chunk_size": COUNT,
    "gc_p_chunk_size": COUNT,
    "dataset_proc_num": COUNT,
    "train_n_passages": COUNT,
    "q_max_len": at_least(SHORTEST),
    "p_max_len": at_least(SHORTEST),
    "projection_in_dim": COUNT,
    "projection_out_dim": COUNT,
    "dropout": BELOW_ONE,
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": BELOW_ONE,
    "publish_steps": at_least(0),
    "publish_per_epoch": COUNT,
    "projection_dim": at_least(0),
    "sequence_length": at_least(SHORTEST),
    "hard_negatives": at_least(0),
    "other_negatives": at_least(0),
}


def check_values(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse numbers out of range, and values that are not among the choices of a flag.

    Args:
        values: name -> value; None and names without a rule are ignored.
        typed: gives the user's spelling of a name.

    Raises:
        UsageError: with the name and the values that it may have.
    """
    for name, allowed in RANGES.items():
        value = values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        largest = LARGEST_SEED if name in SEEDS else LARGEST
        if allowed.contains(value) and value <= largest:
            continue
        expected = f"at most {largest}" if value > largest else allowed.text
        shown = value if isinstance(value, float) or abs(value) < 10**15 else "too large"
        raise UsageError(f"{_named(name, typed)} is {shown}; it must be {expected}")
    check_choices(values, typed)


def check_choices(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse values that are not among the choices of a flag, and unknown losses."""
    for name, allowed in CHOICES.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            *most, last = allowed
            shown = repr(str(value)[:LONGEST_SHOWN])
            raise UsageError(
                f"{_named(name, typed)} is {shown}; expected {', '.join(most)} or {last}"
            )
    loss_names = sorted({*OWN_LOSSES, *losses.names()})
    if (loss := values.get("loss")) is not None and loss not in loss_names:
        shown = repr(str(loss)[:LONGEST_SHOWN])
        hint = did_you_mean(str(loss), loss_names)
        raise UsageError(
            f"{_named('loss', typed)} is {shown}{hint} (known: {', '.join(loss_names)})"
        )


def _named(name: str, typed: Callable[[str], str]) -> str:
    """The flag as it was typed, without dashes; an alias with the name that it stands for."""
    spelled = typed(name).removeprefix("--")
    return spelled if spelled.replace("-", "_").endswith(name) else f"{spelled}: {name}"


def numbers_of(text: str, name: str, example: str) -> list[float]:
    """The numbers of a list in Python's notation; brackets are optional.

    Raises:
        UsageError: with the flag's name and an example.
    """
    try:
        value = ast.literal_eval(text)
        numbers = value if isinstance(value, list | tuple) else [value]
        return [float(number) for number in numbers]
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError):
        shown = repr(text[:LONGEST_SHOWN])
        raise UsageError(f"{name} is {shown}; expected numbers, such as {example}") from None


def upsample_rates(text: str | None) -> list[int]:
    """How often each dataset of a mixture is read in an epoch; empty for None.

    Raises:
        UsageError: not whole numbers above 0.
    """
    if text is None:
        return []
    name = "--train_files_upsample_rates"
    rates = numbers_of(text, name, "[1,2]")
    if not rates or not all(1 <= rate <= LARGEST and rate == int(rate) for rate in rates):
        raise UsageError(f"{name} is {text[:LONGEST_SHOWN]!r}; expected whole numbers above 0")
    return [int(rate) for rate in rates]
