"""`mlflow-dr dpr`: the programs of GC-DPR under their own names, with their own flags."""

from __future__ import annotations

import argparse
import glob
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from mlflow_dr.collection.locations import absolute, quoted_path
from mlflow_dr.errors import UsageError, did_you_mean
from mlflow_dr.files import atomic_write

log = logging.getLogger(__name__)

Command = list[str]
USUAL_DEPTH = 200
CUTS = (1, 5, 20, 100)

COMMON = ("pretrained_model_cfg", "model_file", "sequence_length")
COMMON_SWITCHES = ("no_cuda", "fp16")
IGNORED = (
    *("encoder_model_type", "pretrained_file", "projection_dim", "local_rank", "fp16_opt_level"),
    *("num_workers", "validation_workers", "index_buffer", "dev_batch_size", "adam_betas"),
    *("train_rolling_loss_step", "checkpoint_file_name"),
)
IGNORED_SWITCHES = ("do_lower_case", "save_or_load_index", "fully_resumable")
AVERAGE_RANK = (
    *("val_av_rank_start_epoch", "val_av_rank_hard_neg", "val_av_rank_other_neg"),
    *("val_av_rank_bsz", "val_av_rank_max_qs"),
)
TRAINING = {
    "batch_size": "batch-size",
    "output_dir": "output-dir",
    "learning_rate": "learning-rate",
    "warmup_steps": "warmup-steps",
    "weight_decay": "weight-decay",
    "dropout": "dropout",
    "adam_eps": "adam-eps",
    "max_grad_norm": "max-grad-norm",
    "num_train_epochs": "num-train-epochs",
    "gradient_accumulation_steps": "gradient-accumulation-steps",
    "log_batch_step": "log-batch-step",
    "passages_per_question": "passages-per-question",
    "max_n_answers": "max-n-answers",
    "eval_step": "publish-steps",
    "seed": "seed",
}
PREDICTING = {
    "prediction_results_file": "output",
    "passages_per_question_predict": "passages-per-question",
    "max_answer_length": "max-answer-length",
}


@click.command(
    "dpr",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("program")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def dpr_command(program: str, flags: Sequence[str]) -> int:
    """Run a program of GC-DPR by its own name and flags.

    PROGRAM is train_dense_encoder, generate_dense_embeddings, dense_retriever,
    preprocess_reader_data or train_reader. The commands of this package that do the same are shown
    and run.

    \b
    Example:
        mlflow-dr dpr generate_dense_embeddings --model_file dpr_biencoder.39 \\
            --ctx_file psgs_w100.tsv --out_file passages
        mlflow-dr dpr dense_retriever --model_file dpr_biencoder.39 --ctx_file psgs_w100.tsv \\
            --qa_file nq-test.csv --encoded_ctx_file passages --out_file results.json --n-docs 100
    """
    from mlflow_dr.cli import group

    for command in commands_for(program, flags):
        click.echo(f"mlflow-dr {shlex.join(command)}", err=True)
        result = group.main(command, standalone_mode=False, prog_name="mlflow-dr")
        if isinstance(result, int) and result:
            return result
        if command[0] == "train" and result:  # else nothing was trained, or another process writes
            _keep_encoder(str(result), list(flags))
    return 0


def commands_for(program: str, flags: Sequence[str]) -> list[Command]:
    """The commands that do what a program of GC-DPR does.

    Raises:
        UsageError: no such program or flag, or one that has no counterpart.
    """
    name = program.removesuffix(".py")
    if Path(name).name == "download_data":
        raise UsageError(
            f"{program}: not needed; --dataset nq and --dataset trivia fetch DPR's files, and the "
            "other commands take files that you have"
        )
    if name not in PROGRAMS:
        expected = ", ".join(PROGRAMS)
        near = did_you_mean(name, PROGRAMS) or ";"
        raise UsageError(f"GC-DPR has no program {program!r}{near} expected one of {expected}")
    return PROGRAMS[name](list(flags))


class _Parser(argparse.ArgumentParser):
    """A parser that raises our errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _parsed(
    program: str, flags: Command, values: Sequence[str], switches: Sequence[str] = ()
) -> Mapping[str, Any]:
    """The flags that are given; those without meaning are named in one warning."""
    parser = _Parser(prog=program, add_help=False, allow_abbrev=False)
    for name in (*COMMON, *values, *IGNORED):
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*spellings, dest=name, nargs="+" if name == "eval_top_docs" else None)
    for name in (*COMMON_SWITCHES, *switches, *IGNORED_SWITCHES):
        parser.add_argument(f"--{name}", dest=name, action="store_true", default=None)
    given = {name: v for name, v in vars(parser.parse_args(flags)).items() if v is not None}
    without = [name for name in (*IGNORED, *IGNORED_SWITCHES) if name in given]
    if without:
        log.warning("without meaning here: %s", ", ".join(f"--{name}" for name in without))
    return given


def _options(given: Mapping[str, Any], names: Mapping[str, str]) -> Command:
    return [
        word
        for name, ours in names.items()
        if name in given
        for word in (f"--{ours}", str(given[name]))
    ]


def _machine(given: Mapping[str, Any]) -> Command:
    device = ["--device", "cpu"] if given.get("no_cuda") else []
    return device + (["--dtype", "fp16"] if given.get("fp16") else [])


def _required(program: str, given: Mapping[str, Any], *names: str) -> None:
    if missing := [f"--{name}" for name in names if name not in given]:
        raise UsageError(f"{program} needs {', '.join(missing)}")


def _train(flags: Command) -> list[Command]:
    given, rest = _train_parser().parse_known_args(flags)
    if any(getattr(given, name) is not None for name in AVERAGE_RANK):
        log.warning(
            "--val_av_rank_*: validators measure the average rank, from the first checkpoint on: "
            "`mlflow-dr validate --run-id RUN --measures 'average_rank@30 nll@16'`"
        )
    output = ["--output_dir", given.output_dir] if given.output_dir else []
    return [["train", *rest, *output]]


def _train_parser() -> argparse.ArgumentParser:
    """Of the flags of train_dense_encoder that are not those of `train`."""
    parser = _Parser(prog="train_dense_encoder", add_help=False, allow_abbrev=False)
    for name in AVERAGE_RANK:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    parser.add_argument("--output_dir", "--output-dir")
    parser.add_argument("--checkpoint_file_name", default="dpr_biencoder")
    return parser


def _keep_encoder(run_id: str, flags: Command) -> None:
    """Put the last encoder of a training where GC-DPR saves its checkpoints."""
    from mlflow_dr.tracking.checkpoints import run_checkpoints
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.fetching import checkpoint_files
    from mlflow_dr.tracking.runs import find_run

    given, _ = _train_parser().parse_known_args(flags)
    if given.output_dir is None:
        return
    ready = [c for c in run_checkpoints(find_run(connect(), run_id)) if c.has_all_files]
    target = Path(given.output_dir) / given.checkpoint_file_name
    with checkpoint_files(max(ready, key=lambda c: c.step)) as directory:
        shutil.rmtree(target, ignore_errors=True)
        with atomic_write(target) as partial:
            shutil.copytree(directory, partial)
    click.echo(f"wrote {target}, which --model_file takes")


def _encode(flags: Command) -> list[Command]:
    program = "generate_dense_embeddings"
    names = ("ctx_file", "out_file", "shard_id", "num_shards", "batch_size")
    given = _parsed(program, flags, names)
    _required(program, given, "model_file", "ctx_file", "out_file")
    shard = f"{given.get('shard_id', 0)}/{given.get('num_shards', 1)}"
    command = ["encode", _encoder(given), "--dataset", _dataset(given["ctx_file"])]
    command += ["--output", given["out_file"], "--shard", shard]
    return [command + _options(given, {"sequence_length": "max-length"}) + _machine(given)]


def _retrieve(flags: Command) -> list[Command]:
    program = "dense_retriever"
    given = _parsed(
        program,
        flags,
        (
            *("qa_file", "ctx_file", "encoded_ctx_file", "out_file", "match", "n_docs"),
            *("batch_size", "q_encoding_path"),
        ),
        ("hnsw_index", "encode_q_and_save", "re_encode_q"),
    )
    _required(program, given, "qa_file", "ctx_file")
    if given.get("hnsw_index"):
        raise UsageError(
            f"{program} --hnsw_index: searches are exact here; `mlflow-dr index --factory HNSW32` "
            "writes an index of inner products"
        )
    dataset = _dataset(given["ctx_file"], given["qa_file"])
    queries: str = given.get("q_encoding_path", "")
    if given.get("encode_q_and_save"):
        _required(program, given, "model_file", "q_encoding_path")
        command = ["encode", _encoder(given), "--dataset", dataset, "--split", _split(dataset)]
        return [[*command, "--output", queries, *_machine(given)]]
    _required(program, given, "encoded_ctx_file")
    depth = int(given.get("n_docs", USUAL_DEPTH))
    measures = " ".join(f"accuracy@{cut}" for cut in CUTS if cut <= depth)
    command = ["search", *_sources(given["encoded_ctx_file"]), "--dataset", dataset]
    command += ["--split", _split(dataset), "--depth", str(depth), "--measures", measures]
    if queries and not given.get("re_encode_q"):
        command += ["--queries", queries]
    elif "model_file" in given:
        command += ["--encoder", _encoder(given)]
    if "out_file" in given:
        command += ["--output", given["out_file"], "--format", "dpr"]
    device = ["--device", "cpu"] if given.get("no_cuda") else []
    return [command + _options(given, {"match": "match"}) + device]


def _prepare(flags: Command) -> list[Command]:
    program = "preprocess_reader_data"
    names = ("retriever_results", "out_file", "gold_passages_src", "gold_passages")
    given = _parsed(program, flags, (*names, "gold_passages_src_dev"), ("is_train_set",))
    _required(program, given, "retriever_results")
    command = ["reader-data", "--results", given["retriever_results"]]
    gold = {"gold_passages_src": "gold-passages", "gold_passages": "gold-passages"}
    if not given.get("is_train_set"):
        gold = {"gold_passages_src_dev": "gold-passages"}
    command += _options(given, {"pretrained_model_cfg": "model", **gold})
    return [command + (["--is-train-set"] if given.get("is_train_set") else [])]


def _read(flags: Command) -> list[Command]:
    program = "train_reader"
    names = ("train_file", "dev_file", "eval_top_docs", "gold_passages_src")
    given = _parsed(program, flags, (*names, "gold_passages_src_dev", *TRAINING, *PREDICTING))
    length = {"sequence_length": "sequence-length"}
    commands: list[Command] = []
    reader = _reader(given) if "model_file" in given else given.get("output_dir")
    if "train_file" in given:
        _required(program, given, "output_dir")
        command = ["reader-train", "--train-file", _file(program, given["train_file"])]
        start = {} if "model_file" in given else {"pretrained_model_cfg": "model"}
        gold = {"gold_passages_src": "gold-passages"}
        command += _options(given, {**TRAINING, **length, **start, **gold})
        if "model_file" in given:
            command += ["--model", str(reader)]
        commands.append(command + _machine(given))
        reader = given["output_dir"]
    if "dev_file" in given:
        if reader is None:
            raise UsageError(f"{program} needs --model_file, or --train_file and --output_dir")
        dev_file = _file(program, given["dev_file"])
        command = ["reader-predict", str(reader), "--results", dev_file]
        command += _options(given, {**PREDICTING, **length})
        command += [w for n in given.get("eval_top_docs", []) for w in ("--eval-top-docs", str(n))]
        commands.append(command + _machine(given))
    if not commands:
        raise UsageError(f"{program} needs --train_file, --dev_file, or both")
    return commands


PROGRAMS: Mapping[str, Callable[[Command], list[Command]]] = {
    "train_dense_encoder": _train,
    "generate_dense_embeddings": _encode,
    "dense_retriever": _retrieve,
    "preprocess_reader_data": _prepare,
    "train_reader": _read,
}


def _dataset(passages: str, questions: str | None = None) -> str:
    """The name of a collection of these files."""
    files = [absolute(Path(name)) for name in (passages, questions) if name]
    if missing := [file for file in files if not file.is_file()]:
        raise UsageError(f"{missing[0]}: no such file")
    named = [quoted_path(file) for file in files]
    return f"dpr:{'?queries='.join(named)}"


def _split(dataset: str) -> str:
    from mlflow_dr.collection.catalogue import open_collection

    return open_collection(dataset).splits[0]


def _sources(pattern: str) -> list[str]:
    """What a pattern of encoded passages names: the folder that `encode` wrote, or several."""
    matching = glob.glob(pattern)  # noqa: PTH207 - a pattern may be absolute
    found = sorted(path for path in matching if Path(path).is_dir())
    folder = pattern.rstrip("*").rstrip("_")
    return found or ([folder] if folder else [pattern])


def _file(program: str, pattern: str) -> str:
    """The file of a pattern; a name that matches nothing is refused when it is opened.

    Raises:
        UsageError: several files match.
    """
    found = sorted(glob.glob(pattern))  # noqa: PTH207 - a pattern may be absolute
    if len(found) > 1:
        raise UsageError(
            f"{program}: {len(found)} files match {pattern}, such as {found[0]} and {found[1]}; a "
            "reader reads one file of results, so join them, or name one"
        )
    return found[0] if found else pattern


def _encoder(given: Mapping[str, Any]) -> str:
    """The encoder of `--model_file`: as it is named, or the directory made of a file."""
    return _imported(given, "encoder", _import_encoder)


def _reader(given: Mapping[str, Any]) -> str:
    return _imported(given, "reader", _import_reader)


def _imported(
    given: Mapping[str, Any], kind: str, write: Callable[[Path, Path, str | None], None]
) -> str:
    from mlflow_dr.cache import cache_entry
    from mlflow_dr.collection.jsonl import state_of

    path, backbone = Path(given["model_file"]).expanduser(), given.get("pretrained_model_cfg")
    if not path.is_file():
        return str(given["model_file"])
    key = f"{kind}\n{state_of(path)}\n{backbone}"

    def build(partial: Path) -> None:
        partial.mkdir()
        write(partial / kind, path, backbone)

    return str(cache_entry("imported", key, build, str(path)) / kind)


def _import_encoder(directory: Path, path: Path, backbone: str | None) -> None:
    from mlflow_dr.encoder.dpr_checkpoint import import_dpr
    from mlflow_dr.encoder.saving import save_encoder

    save_encoder(directory, import_dpr(path, backbone))


def _import_reader(directory: Path, path: Path, backbone: str | None) -> None:
    from mlflow_dr.reader.dpr_checkpoint import import_dpr_reader
    from mlflow_dr.reader.model import save_reader

    save_reader(directory, *import_dpr_reader(path, backbone))
