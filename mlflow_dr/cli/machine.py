"""`mlflow-dr doctor` and `cache`: what would fail on this machine, and what is kept on it."""

from __future__ import annotations

import time
from itertools import groupby
from typing import Annotated

import click
from pydantic import AfterValidator

from mlflow_dr.cache_entries import (
    KINDS,
    CacheEntry,
    cache_entries,
    chosen_entries,
    parse_age,
    remove_entries,
)
from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.config import Config, Flag, checked
from mlflow_dr.errors import UsageError
from mlflow_dr.fields import Texts, TrackingUri
from mlflow_dr.files import cache_dir
from mlflow_dr.terminal import byte_count, in_columns, time_span

MOST_SHOWN = 10  # entries of a kind
COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


class DoctorConfig(Config):
    """`mlflow-dr doctor`: which tracking server."""

    tracking_uri: TrackingUri = None


@click.command("doctor", cls=TakesSeveral)
@takes(DoctorConfig)
def doctor_command(config: DoctorConfig) -> int:
    """Check this machine, the tracking server and the hub, before something fails.

    Each check does in small what training and validating do: it multiplies matrices, searches,
    writes a file into the cache, and a tag and a file to the experiment of new runs
    (MLFLOW_EXPERIMENT_NAME), which it removes again. The exit code is 1 if something would fail.

    \b
    Example:
        mlflow-dr doctor --tracking-uri http://127.0.0.1:5000
    """
    from mlflow_dr.doctor.examine import examine

    failed = 0
    for finding in examine(config.tracking_uri):
        failed += finding.level == "fail"
        level = click.style(f"{finding.level:5}", fg=COLORS[finding.level])
        click.echo(f"{level} {finding.name:16} {finding.text}")
    click.echo(f"{failed} of these would fail" if failed else "nothing would fail")
    return int(bool(failed))


class RemoveConfig(Config):
    """`mlflow-dr cache remove`: which entries."""

    names: Annotated[Texts, Flag(positional=True)] = ()
    older_than: Annotated[str | None, AfterValidator(checked(parse_age))] = None
    """Only entries that were not used for this long: 12h, 30d or 2w."""
    everything: Annotated[bool, Flag("--all")] = False
    """All entries."""
    yes: bool = False
    """Do not ask."""


@click.group("cache", invoke_without_command=True)
@click.pass_context
def cache_command(context: click.Context) -> None:
    """List what is kept in the cache: each entry with its size, its last use and what it is.

    The cache is $MLFLOW_DR_CACHE, else ~/.cache/mlflow_dr. Downloads of the Hugging Face hub are in
    a cache of their own, which `hf cache ls` lists.

    \b
    Example:
        mlflow-dr cache
        mlflow-dr cache remove tokens --older-than 30d
    """
    if context.invoked_subcommand is None:
        entries = cache_entries()
        for kind, group in groupby(entries, key=lambda entry: entry.kind):
            of_kind = list(group)
            size = byte_count(sum(entry.bytes for entry in of_kind))
            click.echo(f"{kind}: {KINDS[kind]}, {_count(of_kind)}, {size}")
            click.echo(_table(of_kind[:MOST_SHOWN]))
            if rest := of_kind[MOST_SHOWN:]:
                click.echo(f"  and {_count(rest)} that are smaller")
        total = byte_count(sum(entry.bytes for entry in entries))
        click.echo(f"{_count(entries)}, {total} in {cache_dir()}")


@cache_command.command("remove", cls=TakesSeveral)
@takes(RemoveConfig)
def remove_command(config: RemoveConfig) -> None:
    """Remove entries of the cache; what is needed again is made again.

    NAMES are kinds, such as tokens, or names of entries or their first characters. What a process
    is making or has opened is kept (on Linux; elsewhere stop other commands first).

    \b
    Example:
        mlflow-dr cache remove 438f388d0fd0c3bc
        mlflow-dr cache remove --older-than 30d --yes
    """
    if config.everything == bool(config.names or config.older_than):
        raise UsageError("give names, --older-than or --all")
    entries = chosen_entries(config.names, config.older_than)
    if not entries:
        click.echo("nothing to remove")
        return
    size = byte_count(sum(entry.bytes for entry in entries))
    if not config.yes:
        click.echo(_table(entries))
        _confirm(f"remove {_count(entries)}, {size}?")
    kept: list[CacheEntry] = []
    for entry, reason in remove_entries(entries):
        if reason:
            kept.append(entry)
            click.echo(f"kept {entry.kind} {entry.name}: {reason}")
    removed = [entry for entry in entries if entry not in kept]
    freed = byte_count(sum(entry.bytes for entry in removed))
    click.echo(f"removed {_count(removed)}, {freed}")


def _confirm(question: str) -> None:
    try:
        click.confirm(question, abort=True)
    except click.Abort as error:
        raise UsageError("nothing was removed; answer y, or pass --yes") from error


def _count(entries: list[CacheEntry]) -> str:
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"


def _table(entries: list[CacheEntry]) -> str:
    now = time.time()
    return in_columns(
        [
            (
                f"  {entry.name}",
                byte_count(entry.bytes),
                f"used {time_span(max(0, now - entry.used))} ago",
                entry.about,
            )
            for entry in entries
        ]
    )
