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
from typing import Any

import yaml

from mlflow_dr.encoder.config import POOLINGS, SHORTEST
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.extensions import Registry

PARSER_FLAGS = ("--config", "--help", "-h", "--help_all", "--help-all")
HELP = "`mlflow-dr train --help-all` lists all"


def flag(default: Any, help: str, *aliases: str, **options: Any) -> Any:
    """A dataclass field for HfArgumentParser; aliases are spelled with dashes or underscores."""
    spellings = dict.fromkeys(s for name in aliases for s in (name, _dashed(name)))
    return field(default=default, metadata={"help": help, "aliases": list(spellings), **options})


def _dashed(name: str) -> str:
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


FILES_WITH_FLAGS = ("arguments.py", "gc_dpr.py")


@cache
def known_flags() -> frozenset[str]:
    """Every spelling of every training flag; empty if transformers' source is not found."""
    package = importlib.util.find_spec("transformers")
    directories = (package and package.submodule_search_locations) or []
    theirs = [Path(directory) / "training_args.py" for directory in directories]
    if not theirs or not theirs[0].is_file():
        return frozenset()
    names = set(PARSER_FLAGS)
    ours = [Path(__file__).with_name(file) for file in FILES_WITH_FLAGS]
    for file in (theirs[0], *ours):
        for kind in ast.parse(file.read_text(encoding="utf-8")).body:
            for line in kind.body if isinstance(kind, ast.ClassDef) else ():
                match line:
                    case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call() as made):
                        names |= _spellings(name, made)
    return frozenset(names)


def _spellings(name: str, made: ast.Call) -> set[str]:
    """The spellings of a flag whose field is made by `field(...)` or `flag(...)`."""
    aliases = (str(node.value) for node in made.args[2:] if isinstance(node, ast.Constant))
    spellings = {f"--{name}", *aliases}
    defaults = [word.value for word in made.keywords if word.arg == "default"] or made.args
    if defaults and isinstance(defaults[0], ast.Constant) and defaults[0].value is True:
        spellings.add(f"--no_{name}")  # HfArgumentParser adds the opposite
    return spellings | {_dashed(spelling) for spelling in spellings}


LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
SEEDS = ("seed", "data_seed")
LONGEST_SHOWN = 40
RECIPE_NAMES = ("demo", "msmarco", "judged", "tevatron", "dpr")
MERGED, ADAPTER = "merged", "adapter"
TORCH, JAX = "torch", "jax"
OWN_LOSSES = ("contrastive", "distillation")

losses: Registry[Any] = Registry("loss", "mlflow_dr.losses")
"""Losses by name, see `mlflow_dr.training.loss.Loss`; here, because importing that takes long."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "pooling": tuple(POOLINGS),
    "lora_publish": (MERGED, ADAPTER),
    "recipe": RECIPE_NAMES,
    "engine": (TORCH, JAX),
    "encoder_model_type": ("hf_bert", "pytext_bert", "fairseq_roberta"),
}


RANGES: Mapping[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 0": (
        lambda value: value >= 0,
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_total_limit"),
            *("seed", "data_seed", "dataloader_num_workers", "publish_steps", "projection_dim"),
            *("hard_negatives", "other_negatives", "host_index"),
        ),
    ),
    "at least 1": (
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "gc_q_chunk_size"),
            *("gc_p_chunk_size", "dataset_proc_num", "train_n_passages", "projection_in_dim"),
            *("projection_out_dim", "lora_r", "lora_alpha", "publish_per_epoch", "n_hosts"),
        ),
    ),
    f"at least {SHORTEST}": (
        lambda value: value >= SHORTEST,
        ("q_max_len", "p_max_len", "sequence_length"),
    ),
    "above 0": (
        lambda value: value > 0,
        (
            *("adam_epsilon", "num_train_epochs", "logging_steps", "save_steps"),
            *("temperature", "distil_temperature"),
        ),
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing_factor", "dropout", "lora_dropout"),
    ),
    "above 0 and below 1": (lambda value: 0 < value < 1, ("validation_fraction",)),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("distil_weight",)),
    "at least 1, or -1 for whole epochs": (
        lambda value: value >= 1 or value == -1,
        ("max_steps",),
    ),
}
"""A range, as it follows "it must be " -> whether a number is in it, and its flags.

NaN is in no range.
"""


def check_values(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse numbers out of range, and values that are not among the choices of a flag.

    Args:
        values: name -> value; None and names without a rule are ignored.
        typed: gives the user's spelling of a name.

    Raises:
        UsageError: with the name and the values that it may have.
    """
    for expected, (contains, names) in RANGES.items():
        for name in names:
            value = values.get(name)
            if not isinstance(value, int | float):
                continue
            largest = LARGEST_SEED if name in SEEDS else LARGEST
            if contains(value) and value <= largest:
                continue
            shown = value if isinstance(value, float) or abs(value) < 10**15 else "too large"
            allowed = f"at most {largest}" if value > largest else expected
            raise UsageError(f"{_named(name, typed)} is {shown}; it must be {allowed}")
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
