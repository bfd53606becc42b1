"""`mlflow-dr import` and `export`: checkpoints of DPR and GC-DPR."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click

from mlflow_dr.cli.options import takes
from mlflow_dr.config import Config, Flag
from mlflow_dr.errors import UsageError
from mlflow_dr.fields import File, Force, Length, TrackingUri, TrustRemoteCode


class ImportConfig(Config):
    """`mlflow-dr import`: an encoder from a checkpoint of DPR."""

    checkpoint: Annotated[str, Flag(positional=True)]
    passages: str | None = None
    """Directory or hub name of transformers' DPRContextEncoder, where CHECKPOINT is a
    DPRQuestionEncoder."""
    output: File
    """The folder to write; it must not exist yet."""
    backbone: str | None = None
    """Directory or hub name of the BERT that it was trained from, for configuration and vocabulary
    (default: what the checkpoint says)."""
    max_length: Length | None = None
    """Longest question and passage, in tokens (default: what the checkpoint says, else 512)."""


class ExportConfig(Config):
    """`mlflow-dr export`: a checkpoint of DPR from an encoder."""

    encoder: Annotated[str, Flag(positional=True)]
    output: File
    """The file to write."""
    backbone: str = "bert-base-uncased"
    """What the file names as the BERT that it was trained from; its vocabulary has to be the
    encoder's."""
    force: Force = False
    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None


@click.command("import")
@takes(ImportConfig)
def import_command(config: ImportConfig) -> None:
    """Write the encoder or reader of a checkpoint of DPR or GC-DPR into a directory.

    CHECKPOINT is a file that they saved, or a directory with the DPRReader of transformers. Both
    generations are read: flat settings, and those of hydra. No code in the file is run, and of its
    optimizer nothing is read. Vectors and logits are those of DPR's own programs. With
    --passages, CHECKPOINT and that are the two encoders that transformers has of DPR.

    \b
    Example:
        mlflow-dr import dpr_biencoder.39 --output my-encoder
        mlflow-dr import hf_bert_base.cp --backbone bert-base-uncased --output my-encoder
        mlflow-dr import facebook/dpr-question_encoder-single-nq-base --output my-encoder \\
            --passages facebook/dpr-ctx_encoder-single-nq-base
    """
    from mlflow_dr.encoder.dpr_checkpoint import import_dpr, import_dpr_encoders
    from mlflow_dr.encoder.saving import save_encoder
    from mlflow_dr.files import atomic_write
    from mlflow_dr.reader.dpr_checkpoint import import_dpr_reader, is_dpr_reader
    from mlflow_dr.reader.model import save_reader

    if config.output.exists():
        raise UsageError(f"{config.output} exists already; name another folder")
    path = Path(config.checkpoint).expanduser()
    if config.passages is None and is_dpr_reader(path):
        reader, tokenizer = import_dpr_reader(path, config.backbone)
        with atomic_write(config.output) as partial:
            save_reader(partial, reader, tokenizer)
        click.echo(f"a reader, {reader.config.num_hidden_layers} layers")
        click.echo(f"wrote {config.output}")
        return
    if config.passages is None:
        encoder = import_dpr(path, config.backbone, config.max_length)
    elif config.backbone is None:
        encoder = import_dpr_encoders(config.checkpoint, config.passages, config.max_length)
    else:
        raise UsageError("--backbone and --passages exclude each other; give one of them")
    with atomic_write(config.output) as partial:
        save_encoder(partial, encoder)
    click.echo(
        f"two BERTs, {encoder.dimension} dimensions, {encoder.settings.passage_max_length} tokens"
    )
    click.echo(f"wrote {config.output}")


@click.command("export")
@takes(ExportConfig)
def export_command(config: ExportConfig) -> None:
    """Write an encoder or a reader as a checkpoint that DPR and GC-DPR load.

    ENCODER is a directory, also of a reader, a hub name, or models:/<id> or models:/NAME@best for a
    published checkpoint. Its backbones are BERTs, and its vector is that of the first token, as in
    DPR.

    \b
    Example:
        mlflow-dr export models:/m-0123 --output dpr_biencoder.39
    """
    from mlflow_dr.encoder.dpr_checkpoint import export_dpr
    from mlflow_dr.reader.dpr_checkpoint import export_dpr_reader
    from mlflow_dr.reader.model import load_reader
    from mlflow_dr.tracking.encoders import local_encoder, open_encoder
    from mlflow_dr.tracking.mlmodel import is_reader

    if config.output.exists() and not config.force:
        raise UsageError(f"{config.output} exists already; --force replaces it")
    with local_encoder(config.encoder, config.tracking_uri) as directory:
        if is_reader(Path(directory)):
            export_dpr_reader(*load_reader(directory), config.output, config.backbone)
        else:
            code = config.trust_remote_code
            encoder = open_encoder(directory, label=config.encoder, trust_remote_code=code)
            export_dpr(encoder, config.output, config.backbone)
    click.echo(f"wrote {config.output}")
