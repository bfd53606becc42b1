"""A loader study: every cell a fresh process, in interleaved repeats, and what was measured."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.errors import ChildError, UsageError
from mlflow_dr.files import atomic_write, cache_dir, digest_of, scratch, usable_cores
from mlflow_dr.loaders.cell import (
    NO_MODEL,
    Cell,
    Workload,
    end_processes,
    process_failure,
    write_spec,
)
from mlflow_dr.loaders.config import LoadersConfig
from mlflow_dr.loaders.documents import (
    check_stores,
    document_tokenizer,
    enlarged,
    tiny_encoder_directory,
    write_sampled_rows,
)
from mlflow_dr.loaders.report import write_study
from mlflow_dr.loaders.results import CellFigures, LoaderStudy
from mlflow_dr.progress import progress_bar
from mlflow_dr.stores.store import open_store, store_directory
from mlflow_dr.tracking.artifacts import LOADERS_FOLDER, log_study
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.descriptions import dated_name
from mlflow_dr.tracking.encoders import local_encoder
from mlflow_dr.tracking.runs import open_run
from mlflow_dr.version import VERSION

log = logging.getLogger(__name__)

LAYOUT = 1
DEFAULT_DATASET = "demo"
TINY, TOKENS = "tiny", "tokens"
SECONDS_TO_STOP = 10.0


def logged_study(config: LoadersConfig) -> LoaderStudy:
    """Do a study and log it: a run with the report, and a child run for each cell.

    Raises:
        TrackingError: the tracking server cannot be reached, or did not take it.
        MlflowDrError: what `study_loaders` raises.
    """
    if config.no_log:
        return study_loaders(config)
    client = connect(config.tracking_uri)
    usual = dated_name("loaders", config.dataset or DEFAULT_DATASET)
    run = open_run(client, config.experiment_name, name=config.run_name, default_name=usual)
    log.info("run %s (%s)", run.id, run.name)
    with run.finish_on_exit("the study"), scratch() as directory:
        run.log_params({"dataset": config.dataset, **config.given()})
        study = study_loaders(config)
        for measured in study.measured:
            run.log_child(measured.cell.label, asdict(measured.cell), measured.metrics)
        log_study(run, write_study(study, directory), LOADERS_FOLDER)
    return study


def study_loaders(config: LoadersConfig) -> LoaderStudy:
    """Measure all cells of a configuration.

    What is measured is kept until the study is complete, so that an interrupted one goes on. A cell
    that cannot be measured, such as one whose RAM disk is too small, is passed over.

    Args:
        config: the cells, and what they load.

    Raises:
        UsageError: an unknown dataset or encoder, too few passages, or another study is running.
        DataError: the dataset's files are damaged, or a store gives other documents than the rest.
        ChildError: no cell could be measured.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    with ExitStack() as ending:
        ending.enter_context(_only_study())
        work = _prepare(config, ending)
        measured = _measure_all(config, work.workloads, work.model, work.state)
        if not any(cell.repeats for cell in measured):
            raise ChildError(f"no cell could be measured: {measured[0].problem}")
        shutil.rmtree(work.state)
    return LoaderStudy(
        dataset=config.dataset or DEFAULT_DATASET,
        passages=work.passages,
        payload=config.payload,
        model=config.model,
        cells=measured,
        build_seconds=work.build_seconds,
    )


class _Work(NamedTuple):
    """What cells need.

    Attributes:
        workloads: store -> what its cells load.
        model: directory or hub name of the encoder that is trained.
        state: where figures are kept until the study is complete.
        passages: how many there are.
        build_seconds: store -> how long its files took to build.
    """

    workloads: dict[str, Workload]
    model: str
    state: Path
    passages: int
    build_seconds: dict[str, float]


def _prepare(config: LoadersConfig, ending: ExitStack) -> _Work:
    """Make what cells need; no file is mapped any more when it returns.

    Raises:
        UsageError: an unknown dataset or encoder, or too few passages.
        DataError: the dataset's files are damaged, or a store gives other documents than the rest.
    """
    dataset = open_collection(config.dataset or DEFAULT_DATASET)
    corpus = enlarged(dataset.corpus(), config.passages, config.seed)
    model = ""
    if config.model not in (NO_MODEL, TINY):
        model = ending.enter_context(local_encoder(config.model, config.tracking_uri))
    elif config.model == TINY or (config.needs_tokenizer and not config.tokenizer):
        model = str(tiny_encoder_directory(corpus, config.max_length))
    tokenizer = config.tokenizer or model
    directories, seconds = _built_stores(config, corpus, tokenizer)
    state = _state_directory(config, corpus)
    rows = write_sampled_rows(state, len(corpus), config.samples, config.seed)
    workloads = {
        store: Workload(
            directory=str(directory),
            tokenizer=tokenizer,
            max_length=config.max_length,
            rows=str(rows),
            batch_size=config.batch_size,
            samples=config.samples,
            seconds=config.seconds,
            model_batches=config.model_batches,
            seed=config.seed,
            device=config.device,
            backend=config.backend,
        )
        for store, directory in directories.items()
    }
    return _Work(workloads, model, state, len(corpus), seconds)


def _built_stores(
    config: LoadersConfig, corpus: Corpus, tokenizer: str
) -> tuple[dict[str, Path], dict[str, float]]:
    """The directory of each store, and the seconds that each took to build, after a comparison.

    Raises:
        DataError: one gives other documents than the corpus has.
    """
    directories: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    text_tokenizer = None
    with ExitStack() as ending:
        stores = {}
        for store in dict.fromkeys(cell.store for cell in config.cells):
            begun = time.monotonic()
            if store == TOKENS:
                text_tokenizer = document_tokenizer(tokenizer, config.max_length)
                table = corpus_tokens(corpus, text_tokenizer, usable_cores())
                directories[store] = Path(str(table.directory))  # it is in the cache
            else:
                directories[store] = store_directory(store, corpus)
            seconds[store] = time.monotonic() - begun
            stores[store] = ending.enter_context(open_store(store, directories[store]))
        check_stores(stores, corpus, text_tokenizer, config.seed)
    return directories, seconds


def _state_directory(config: LoadersConfig, corpus: Corpus) -> Path:
    """Where figures are kept until the study is complete; empty for a study that begins anew."""
    ignored = {"output", "no_log", "run_name", "experiment_name", "force", "tracking_uri"}
    digest = digest_of(
        LAYOUT,
        VERSION,
        platform.node(),
        corpus.digest,
        config.model_dump_json(exclude=ignored),
    )
    directory = cache_dir() / "loaders" / f"study-{digest}"
    if config.force:
        shutil.rmtree(directory, ignore_errors=True)
    if directory.is_dir():
        log.info("the study goes on where it was interrupted; --force begins anew")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _measure_all(
    config: LoadersConfig, workloads: Mapping[str, Workload], model: str, state: Path
) -> list[CellFigures]:
    """The figures of all cells; each repeat measures every cell once, in the same order.

    Args:
        config: the cells.
        workloads: store -> what its cells load.
        model: directory or hub name of the encoder that is trained.
        state: where the figures of each process are kept.
    """
    cells = config.cells
    found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    problems: dict[Cell, str] = {}
    with progress_bar(len(cells) * config.repeats, "measuring", "cells") as bar:
        for repeat in range(config.repeats):
            for number, cell in enumerate(cells):
                # what the model takes does not depend on the cell, so one repeat is enough
                trains = cell.model != NO_MODEL and repeat == 0
                spec = replace(cell, model=model if trains else NO_MODEL)
                file = state / f"{number}.{repeat}.json"
                try:
                    if cell not in problems and not file.is_file():
                        _measure(spec, workloads[cell.store], file)
                except ChildError as error:
                    log.warning("%s: %s", cell.label, error)
                    problems[cell] = str(error)
                if cell not in problems:
                    found[cell].append(json.loads(file.read_text(encoding="utf-8")))
                bar.update(1)
    return [CellFigures(cell, found[cell], problems.get(cell, "")) for cell in cells]


def _measure(cell: Cell, workload: Workload, file: Path) -> None:
    """Measure a cell in a new process, which writes its figures into a file.

    Raises:
        ChildError: the process failed, with what it said.
    """
    with atomic_write(file) as result:
        spec = result.with_name("spec.json")
        write_spec(spec, cell, workload)
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow_dr.loaders.cell", str(spec), str(result)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, messages = process.communicate()
        finally:
            end_processes([process], SECONDS_TO_STOP)
        if process.returncode:
            raise ChildError(process_failure(process.returncode, messages))


@contextmanager
def _only_study() -> Iterator[None]:
    """Hold the lock of this machine's studies.

    Raises:
        UsageError: another study is running; the two would disturb each other.
    """
    path = cache_dir() / "loaders.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            "another loader study is running on this machine, and two would disturb each other; "
            "wait until it has ended"
        ) from error
    try:
        yield
    finally:
        lock.release()
