"""`mlflow-dr train` and `mlflow-dr run`."""

from __future__ import annotations

import inspect

import click
from click.shell_completion import CompletionItem

from mlflow_dr.cli.options import TakesSeveral, check_trainer_flags, complete_paths, takes
from mlflow_dr.validation.config import RunConfig

HELP_WIDTH = 100
ALL_FLAGS = {"--help-all", "--help_all"}
HELP_FLAGS = {"-h", "--help", *ALL_FLAGS}


class _HandsFlagsOn(click.Command):
    """A command that hands flags on to the training; a shell completes them, too."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("-"):
            return items
        from mlflow_dr.training.flags import known_flags

        # each flag has a spelling with underscores and one with dashes
        other = "_" if "-" in incomplete.removeprefix("--") else "-"
        flags = known_flags() - {item.value for item in items}
        names = [name for name in sorted(flags) if name.startswith(incomplete)]
        return items + [CompletionItem(name) for name in names if other not in name[2:]]


class _Run(_HandsFlagsOn, TakesSeveral):
    """`mlflow-dr run`."""


@click.command(
    "train",
    cls=_HandsFlagsOn,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_paths)
def train_command(flags: tuple[str, ...]) -> str | None:
    """Train an encoder and publish its checkpoints to MLflow.

    Takes the flags of Hugging Face's TrainingArguments, of Tevatron and of GC-DPR, with dashes or
    underscores, and --config FILE (YAML or JSON). The recipe of a collection may set other defaults
    than those listed. --help lists the usual flags, and --help-all lists all.

    \b
    Example:
        mlflow-dr train --dataset demo --model tiny --max-steps 300 --publish-steps 50
    """
    if asked := HELP_FLAGS & set(flags):
        about = inspect.cleandoc(train_command.help or "").replace("\b\n", "")
        click.echo(f"{about}\n\n{_flags_text(bool(asked & ALL_FLAGS))}")
        return None
    from mlflow_dr.training.flags import check_flags

    check_flags(flags)  # before five seconds of imports
    from mlflow_dr.training.parsing import parse_training
    from mlflow_dr.training.train import compile_only, train

    request = parse_training(flags)
    if request.engine.compile_only:
        click.echo(compile_only(request))
        return None
    return train(request)


def _flags_text(everything: bool) -> str:
    """The flags with their defaults, section by section."""
    from mlflow_dr.training.flag_help import flag_sections

    formatter = click.HelpFormatter(max_width=HELP_WIDTH)
    for title, flags in flag_sections(everything).items():
        with formatter.section(title):
            defaults = [f"  [default: {flag.default}]" if flag.default else "" for flag in flags]
            formatter.write_dl(
                [
                    (", ".join(flag.names), flag.meaning + default)
                    for flag, default in zip(flags, defaults, strict=True)
                ]
            )
    return formatter.getvalue().rstrip()


@click.command(
    "jax-train",
    cls=_HandsFlagsOn,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def jax_train_command(context: click.Context, flags: tuple[str, ...]) -> None:
    """Train on TPUs, as Tevatron's jax_train does.

    The same as `mlflow-dr train --engine jax --negatives_x_device`, whose flags it takes.

    \b
    Example:
        mlflow-dr jax-train --dataset_name demo --model_name_or_path tiny --do_train
    """
    if HELP_FLAGS & set(flags):
        click.echo(inspect.cleandoc(jax_train_command.help or "").replace("\b\n", ""))
        return
    context.invoke(train_command, flags=("--engine", "jax", "--negatives_x_device", "true", *flags))


@click.command("run", cls=_Run, context_settings={"ignore_unknown_options": True})
@takes(RunConfig)
@click.argument("trainer_flags", nargs=-1, type=click.UNPROCESSED)
def run_command(config: RunConfig, trainer_flags: tuple[str, ...]) -> None:
    """Train and validate side by side; what `mlflow run .` calls.

    Flags that are not listed go to `mlflow-dr train`, and --seed is the training's. The validator
    takes the last GPU when there are two or more, else its share of the processor.

    \b
    Example:
        mlflow-dr run --dataset demo --learning-rate 1e-3 --patience 3
    """
    check_trainer_flags(trainer_flags)
    from mlflow_dr.launch import launch  # five seconds of imports

    launch(config, [*config.training_flags, *trainer_flags])
