"""Tevatron's flags of `encode` and `search`, versions 1 to 3, put into ours before they are parsed.

A flag that has no effect here is named in one warning. `docs/from-tevatron.md` lists all of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from glob import glob
from pathlib import Path

import click

from mlflow_dr.cli.options import TakesSeveral, with_dashes
from mlflow_dr.errors import UsageError
from mlflow_dr.files import is_path

log = logging.getLogger(__name__)

Given = Mapping[str, str]
"""Tevatron's flags on a command line, with dashes -> value; of a switch, `true` or `false`."""

ENCODE_RENAMED = {
    "--encode-output-path": "--output",
    "--encoded-save-path": "--output",
    "--query-max-len": "--q-max-len",
    "--passage-max-len": "--p-max-len",
    "--tokenizer-name": "--tokenizer",
}
ENCODE_VALUES = {
    *ENCODE_RENAMED,
    "--model-name-or-path",
    "--lora-name-or-path",
    "--dataset-name",
    "--dataset-split",
    "--dataset-path",
    "--encode-in-path",
    "--encode-num-shard",
    "--encode-shard-index",
    "--dataset-number-of-shards",
    "--dataset-shard-index",
    "--pooling",
}
ENCODE_SWITCHES = {
    "--encode-is-query",
    "--encode-is-qry",
    "--fp16",
    "--bf16",
    "--normalize",
    "--append-eos-token",
}
BOOLEANS = ("true", "false")  # may follow a switch, as Hugging Face's parser has it
ENCODE_IGNORED = {
    "--output-dir",
    "--per-device-eval-batch-size",
    "--batch-size",
    "--config-name",
    "--cache-dir",
    "--dataset-cache-dir",
    "--data-cache-dir",
    "--dataset-proc-num",
    "--num-proc",
    "--dataloader-num-workers",
    "--attn-implementation",
    "--padding-side",
    "--pad-to-multiple-of",
    "--passage-field-separator",
    "--dataset-config",
    "--lora-r",
}
ENCODE_IGNORED_SWITCHES = {"--lora", "--tf32", "--do-encode", "--overwrite-output-dir"}
SEARCH_RENAMED = {"--query-reps": "--queries", "--save-ranking-to": "--output"}
SEARCH_VALUES = {*SEARCH_RENAMED, "--passage-reps", "--score-dir", "--results-dir"}
SEARCH_IGNORED = {"--batch-size", "--query"}
SEARCH_IGNORED_SWITCHES = {
    "--save-text",
    "--quiet",
    "--shard-search",
    "--gpu-float32",
    "--cpu-search",
}
POOLINGS = {"eos": "last", "first": "cls", "avg": "mean", "average": "mean"}


class EncodeCommand(TakesSeveral):
    """Also takes Tevatron's flags for encoding."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put Tevatron's flags into ours, then parse."""
        values = ENCODE_VALUES | ENCODE_IGNORED
        switches = ENCODE_SWITCHES | ENCODE_IGNORED_SWITCHES
        given, rest = _split(args, values, switches)
        _warn(given, ENCODE_IGNORED | ENCODE_IGNORED_SWITCHES)
        return super().parse_args(ctx, encode_flags(given, rest))


class SearchCommand(TakesSeveral):
    """Also takes Tevatron's flags for searching."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put Tevatron's flags into ours, then parse."""
        values = SEARCH_VALUES | SEARCH_IGNORED
        given, rest = _split(args, values, SEARCH_IGNORED_SWITCHES)
        _warn(given, SEARCH_IGNORED | SEARCH_IGNORED_SWITCHES - {"--save-text"})
        return super().parse_args(ctx, search_flags(given, rest))


def encode_flags(given: Given, rest: list[str]) -> list[str]:
    """Our command line for Tevatron's flags of `encode`.

    Args:
        given: Tevatron's flags.
        rest: what else is on the command line.

    Raises:
        UsageError: flags that contradict each other, or that need another one.
    """
    encoder = given.get("--lora-name-or-path") or given.get("--model-name-or-path")
    flags = [encoder, *rest] if encoder else list(rest)
    for name, ours in ENCODE_RENAMED.items():
        flags += [ours, given[name]] if name in given else []
    if pooling := given.get("--pooling"):
        flags += ["--pooling", POOLINGS.get(pooling, pooling)]
    for number, count in (
        ("--encode-shard-index", "--encode-num-shard"),
        ("--dataset-shard-index", "--dataset-number-of-shards"),
    ):
        if number in given or count in given:
            shown = f"{given.get(number, '0').lstrip('0') or '0'}/{given.get(count, '1')}"
            flags += ["--shard", shown]
    for switch, off in (("--normalize", ["--no-normalize"]), ("--append-eos-token", [])):
        if switch in given:
            flags += [switch] if given[switch] == "true" else off
    is_query = "true" in (given.get("--encode-is-query"), given.get("--encode-is-qry"))
    if file := given.get("--dataset-path") or given.get("--encode-in-path"):
        flags += ["--texts", file, *(["--texts-are-queries"] if is_query else [])]
    else:
        flags += _dataset_flags(given, rest, is_query)
    dtypes = [name for name in ("fp16", "bf16") if given.get(f"--{name}") == "true"]
    if len(dtypes) > 1:
        raise UsageError("--fp16 and --bf16 exclude each other")
    return [*flags, "--dtype", dtypes[0]] if dtypes else flags


def search_flags(given: Given, rest: list[str]) -> list[str]:
    """Our command line for Tevatron's flags of `search`, and of the scripts that merge shards.

    Args:
        given: Tevatron's flags.
        rest: what else is on the command line.

    Raises:
        UsageError: no file fits the pattern, or the folder of rankings is empty.
    """
    flags: list[str] = []
    if pattern := given.get("--passage-reps"):
        found = sorted(glob(pattern))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not found:
            raise UsageError(f"--passage_reps: nothing fits {pattern!r}")
        flags += [*found, "--partial", "--keep-own-id"]
    if folder := given.get("--score-dir") or given.get("--results-dir"):
        rankings = sorted(str(path) for path in Path(folder).glob("*") if path.is_file())
        if not rankings:
            raise UsageError(f"{folder}: there are no rankings to merge")
        flags += [*rankings, "--merge", "--keep-own-id"]
    flags += rest
    for name, ours in SEARCH_RENAMED.items():
        flags += [ours, given[name]] if name in given else []
    if given and not any(word.startswith("--format") for word in rest):
        flags += ["--format", "tevatron"]
    return flags


def _dataset_flags(given: Given, rest: list[str], is_query: bool) -> list[str]:
    """Our flags for the dataset and the split.

    Raises:
        UsageError: queries are encoded, and no split is named.
    """
    name, split = _dataset(given.get("--dataset-name", ""), is_query)
    split = given.get("--dataset-split") or split
    flags = ["--dataset", name] if name else []
    if is_query and split:
        flags += ["--split", split]
    elif is_query and not any(word.startswith("--split") for word in rest):
        raise UsageError("--encode_is_query needs --dataset_split, whose queries are encoded")
    return flags


def _dataset(name: str, is_query: bool) -> tuple[str, str]:
    """Our name of one of Tevatron's datasets, and the split that is part of it."""
    split = ""
    if not is_path(name):
        parts = name.split("/")
        if len(parts) == 3:
            name, split = "/".join(parts[:2]), parts[2]
        if not is_query:
            name = re.sub(r"-corpus(-new)?$", r"\1", name)
    return name, split


def _split(args: list[str], values: set[str], switches: set[str]) -> tuple[Given, list[str]]:
    """Tevatron's flags on a command line, and the rest of it."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = [*args][::-1]
    while words:
        word = words.pop()
        flag, equals, value = word.partition("=")
        name = with_dashes(flag)
        if name in values:
            given[name] = value if equals or not words else words.pop()
            if not given[name]:
                raise UsageError(f"{flag} needs a value")
        elif name in switches:
            if not equals:
                value = words.pop() if words and words[-1].lower() in BOOLEANS else "true"
            given[name] = value.lower()
        else:
            rest.append(word)
    return given, rest


def _warn(given: Given, ignored: set[str]) -> None:
    if names := [
        name.replace("-", "_").replace("__", "--", 1) for name in given if name in ignored
    ]:
        log.warning("%s: accepted, without effect", ", ".join(names))
