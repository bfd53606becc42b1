"""The names of all training flags, read without importing torch or transformers.

A mistyped flag is refused within a second this way; importing what the flags belong to takes five.
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
from mlflow_dr.errors import UsageError

OWN_SOURCES = ("arguments.py", "gc_dpr.py")
THEIR_CLASS = "TrainingArguments"
ALWAYS_THERE = ("--config", "--help", "-h")
HELP = "`mlflow-dr train --help` lists all"


def flag(default: Any, help: str, *aliases: str, **options: Any) -> Any:
    """A field that HfArgumentParser makes a flag of; each alias with dashes or underscores."""
    spellings = dict.fromkeys(s for name in aliases for s in (name, dashed(name)))
    return field(default=default, metadata={"help": help, "aliases": list(spellings), **options})


def dashed(name: str) -> str:
    """A flag's name with dashes where it has underscores."""
    return "--" + name.removeprefix("--").replace("_", "-")


def check_flags(words: Sequence[str], others: Iterable[str] = ()) -> None:
    """Refuse unknown flags and unknown words of closed choices, before anything is imported.

    Args:
        words: the flags of `mlflow-dr train`; with `--config FILE`, those in the file, too.
        others: names of flags that the command has besides, to be suggested.

    Raises:
        UsageError: a flag is unknown or has a value that it does not take; or the file of flags
            cannot be read.
    """
    known = known_flags()
    if not known:
        return
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name != "--" and name not in known:
            raise UsageError(unknown_flag(name, [*known, *others]))
    for name, value in values_of(words):
        field_name = name.removeprefix("--").replace("-", "_")
        check_choices({field_name: value}, {field_name: name}.__getitem__)
        if name == "--config":
            read_flags(Path(value), known)


def values_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The flags among words that are followed by a value, as they are typed, and the value."""
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif position + 1 < len(words) and not words[position + 1].startswith("--"):
            yield name, words[position + 1]


def read_flags(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Flags and values of a YAML or JSON file; the names begin with `--` and have underscores.

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
        raise UsageError(f"{path}: expected flags and values, got {type(values).__name__}")
    names = {key: f"--{str(key).replace('-', '_')}" for key in values}
    for name in names.values():
        if name not in known or name in ALWAYS_THERE:
            raise UsageError(f"{path}: {unknown_flag(name, known)}")
    return {names[key]: value for key, value in values.items()}


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """What is said of an unknown flag, with the known one that is most like it."""
    name = word.split("=", 1)[0][:80]
    spelled = name.replace("-", "_").replace("__", "--", 1)
    close = difflib.get_close_matches(spelled, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"no flag {name}{hint} {HELP}"


@cache
def known_flags() -> frozenset[str]:
    """Every spelling of every training flag; empty where transformers' source is not found."""
    package = importlib.util.find_spec("transformers")
    places = (package and package.submodule_search_locations) or []
    theirs = [Path(place) / "training_args.py" for place in places]
    if not theirs or not theirs[0].is_file():
        return frozenset()
    files = [theirs[0], *(Path(__file__).with_name(name) for name in OWN_SOURCES)]
    found: dict[str, ast.expr | None] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found |= _fields(node, named=node.name == THEIR_CLASS)
    names = {spelling for name, value in found.items() for spelling in _spellings(name, value)}
    return frozenset({*names, *ALWAYS_THERE})


def _fields(node: ast.ClassDef, named: bool) -> dict[str, ast.expr | None]:
    """The fields of a dataclass that are flags: all of transformers', and what `flag` makes."""
    return {
        line.target.id: line.value
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if named or _is_call(line.value, "flag")
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
    if isinstance(default, ast.Constant) and default.value is True:  # HfArgumentParser's opposite
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

CHOICES: Mapping[str, tuple[str, ...]] = {
    "pooling": POOLINGS,
    "lora_publish": (MERGED, ADAPTER),
    "recipe": RECIPE_NAMES,
    "encoder_model_type": ("hf_bert", "pytext_bert", "fairseq_roberta"),
}


class Range(NamedTuple):
    """What a number may be; NaN is in no range.

    Attributes:
        words: the range, as it ends the sentence "it must be ...".
        holds: whether a number is in it.
    """

    words: str
    holds: Callable[[float], bool]


def at_least(lowest: int) -> Range:
    """Numbers from `lowest` on."""
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
    """Refuse numbers out of range and words that are none of a closed choice.

    Args:
        values: name -> value; None is no value, and names without a rule are not looked at.
        typed: how the user spelled a name.

    Raises:
        UsageError: with the name and what it may be.
    """
    for name, allowed in RANGES.items():
        value = values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        largest = LARGEST_SEED if name in SEEDS else LARGEST
        if allowed.holds(value) and value <= largest:
            continue
        words = f"at most {largest}" if value > largest else allowed.words
        shown = value if isinstance(value, float) or abs(value) < 10**15 else "too large"
        raise UsageError(f"{_named(name, typed)} is {shown}; it must be {words}")
    check_choices(values, typed)


def check_choices(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse words that are none of a closed choice, as `check_values` does."""
    for name, allowed in CHOICES.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            *most, last = allowed
            shown = repr(str(value)[:LONGEST_SHOWN])
            raise UsageError(
                f"{_named(name, typed)} is {shown}; expected {', '.join(most)} or {last}"
            )


def _named(name: str, typed: Callable[[str], str]) -> str:
    """The flag as it was typed, without dashes, and its first name where that is another one."""
    spelled = typed(name).removeprefix("--")
    return spelled if spelled.replace("-", "_").endswith(name) else f"{spelled}: {name}"


def numbers_of(text: str, name: str, example: str) -> list[float]:
    """The numbers of a list that is written as in Python; the brackets may be left out.

    Raises:
        UsageError: with the flag's name and an example.
    """
    try:
        read = ast.literal_eval(text)
        numbers = read if isinstance(read, list | tuple) else [read]
        return [float(number) for number in numbers]
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError):
        shown = repr(text[:LONGEST_SHOWN])
        raise UsageError(f"{name} is {shown}; expected numbers, such as {example}") from None


def upsample_rates(text: str | None) -> list[int]:
    """How often each part of a mixture is read in an epoch; empty where nothing is said.

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
