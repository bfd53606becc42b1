"""Question answering part by part: each part calls what the other commands call.

questions -> retriever -> vectors -> results -> reader -> predictions -> page
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow_dr.decisions.best import find_best, mark_best
from mlflow_dr.launch import Command, check_ended, launch, run_both, share_machine
from mlflow_dr.qa.config import TINY, QaConfig
from mlflow_dr.qa.page import write_qa_page
from mlflow_dr.qa.progress import FILE as PARTS
from mlflow_dr.qa.progress import FinishedParts
from mlflow_dr.qa.questions import DEV, TRAIN, open_questions, prepare_questions
from mlflow_dr.reader.config import ReaderPredictConfig
from mlflow_dr.reader.prediction import predict_answers
from mlflow_dr.tracking.artifacts import QA_FOLDER, log_study
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.descriptions import dated_name, describe_run
from mlflow_dr.tracking.results import TIMINGS
from mlflow_dr.tracking.runs import TrackedRun, is_over, open_run
from mlflow_dr.tracking.status import curves_hint
from mlflow_dr.tracking.validations import recorded_values
from mlflow_dr.training.encoder_setup import check_encoder
from mlflow_dr.validation.config import RunConfig
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig
from mlflow_dr.vectors.encoding import encode
from mlflow_dr.vectors.searching import search

log = logging.getLogger(__name__)

CUTS = (1, 5, 20, 100)
READER = "reader"
SETTINGS = {
    "questions": (
        *("dataset", "train_split", "split", "train_questions", "dev_questions"),
        *("seed", "match"),
    ),
    "retriever": ("model", "subset", "depth"),
    "vectors": (),
    "results": (),
    "reader": (
        *("reader_model", "reader_steps", "reader_publish_steps", "reader_batch_size"),
        *("reader_learning_rate", "passages_per_question", "sequence_length", "eval_top_docs"),
    ),
    "predictions": (),
}
"""What each part depends on, beside what the parts before it depend on."""


def answer_questions(config: QaConfig, training: Sequence[str] = ()) -> Path:
    """Train a retriever and a reader, each with its curve, and answer questions with both.

    Finished parts in the folder are kept, so an interrupted run goes on where it was.

    Args:
        config: of all parts.
        training: other flags of `mlflow-dr train`.

    Returns:
        The page with all figures.

    Raises:
        UsageError: there is no such collection or split, or the folder is of other settings.
        ChildError: a trainer or validator ended with an error.
        MlflowDrError: what a part raises.
        KeyboardInterrupt: Ctrl-C or SIGTERM came.
    """
    open_questions(config)  # before there is a run
    folder = config.folder
    values = config.model_dump(mode="json")
    settings = {part: {name: values[name] for name in names} for part, names in SETTINGS.items()}
    settings["retriever"]["training"] = shlex.join(training)
    parts = FinishedParts(folder, settings, config.force)
    if "retriever" not in parts:
        check_encoder(config.model, config.tracking_uri)
    usual = dated_name(config.dataset, "qa", config.model)
    run = open_run(connect(config.tracking_uri), config.experiment_name, default_name=usual)
    log.info("run %s (%s); all files are written to %s", run.id, run.name, folder)
    with run.finish_on_exit("question answering"):
        run.log_params({"dataset": config.dataset, "model": config.model, **config.given()})
        describe_run(run)
        pipeline = Pipeline(config, folder, run, parts, training)
        for name, work in pipeline.work.items():
            log.info("%s: %s", name, "finished before" if name in parts else "begins")
            parts.do(name, work)
        page = write_qa_page(folder, config.dataset, parts, {"question answering": run.id})
        files = [page, folder / PARTS, folder / "predictions.json"]
        log_study(run, files, QA_FOLDER)
        _log_curves(run, parts)
    for line in curves_hint(run).splitlines():
        log.info("%s", line)
    return page


class Pipeline:
    """The parts and how each is done.

    Args:
        config: of all parts.
        folder: what they write.
        run: has the trainings as its children.
        parts: those that are finished.
        training: other flags of `mlflow-dr train`.
    """

    def __init__(
        self,
        config: QaConfig,
        folder: Path,
        run: TrackedRun,
        parts: FinishedParts,
        training: Sequence[str],
    ) -> None:
        self._config = config
        self._folder = folder
        self._run = run
        self._parts = parts
        self._training = training

    @property
    def work(self) -> Mapping[str, Callable[[], Mapping[str, Any]]]:
        """Each part and what does it, in order."""
        return {
            "questions": self.questions,
            "retriever": self.retriever,
            "vectors": self.vectors,
            "results": self.results,
            "reader": self.reader,
            "predictions": self.predictions,
        }

    @property
    def _measures(self) -> str:
        """What the retriever is measured by; the first decides which checkpoint is best."""
        depth = self._config.depth
        accuracies = [f"accuracy@{cut}" for cut in sorted({*CUTS, depth}) if cut <= depth]
        judged = ["mrr@10"] if self._parts["questions"]["is_judged"] and depth >= 10 else []
        return " ".join([*judged, *accuracies])

    def questions(self) -> Mapping[str, Any]:
        """Sample questions, and find examples if the collection has none."""
        target = self._folder / "questions"
        shutil.rmtree(target, ignore_errors=True)
        return prepare_questions(self._config, target)._asdict()

    def retriever(self) -> Mapping[str, Any]:
        """Train the retriever while validators measure its checkpoints."""
        config, questions = self._config, self._parts["questions"]
        output = self._folder / "retriever"
        flags = [*questions["training"], "--output_dir", str(output)]
        flags += ["--overwrite_output_dir", "true", "--seed", str(config.seed)]
        flags += ["--model", config.model]
        if config.model == TINY and "--recipe" not in self._training:
            flags += ["--recipe", "demo", "--max_steps", "150"]  # learns from scratch
        validation = RunConfig(
            measures=self._measures,
            match=config.match,
            subset=config.subset,
            poll_seconds=config.poll_seconds,
        )
        with self._child("retriever") as run:
            launch(validation, [*flags, *self._training], run)
            name = validation.validation().all_validations[0].name
            return _best_and_curve(run, name, self._measures.split()[0])

    def vectors(self) -> Mapping[str, Any]:
        """Encode all passages with the best retriever."""
        manifests = encode(
            EncodeConfig(
                encoder=self._parts["retriever"]["best"],
                dataset=self._parts["questions"]["dataset"],
                output=self._folder / "vectors",
                tracking_uri=self._config.tracking_uri,
                force=True,
            )
        )
        return {"shards": len(manifests)}

    def results(self) -> Mapping[str, Any]:
        """Find passages for the questions of both splits."""
        accuracy = {}
        for split in (TRAIN, DEV):
            found = search(
                SearchConfig(
                    sources=(self._folder / "vectors",),
                    dataset=self._parts["questions"]["dataset"],
                    split=split,
                    depth=self._config.depth,
                    measures=self._measures,
                    match=self._config.match,
                    output=self._folder / f"{split}.json",
                    tracking_uri=self._config.tracking_uri,
                    force=True,
                )
            )
            accuracy[split] = {str(measure): value for measure, value in found.measures.items()}
        return accuracy

    def reader(self) -> Mapping[str, Any]:
        """Train the reader while a validator measures its checkpoints."""
        config = self._config
        trainer_variables, validator_variables, _ = share_machine()
        retriever = self._parts["retriever"]["best"]
        train: dict[str, object] = {
            "train-file": self._folder / f"{TRAIN}.json",
            "output-dir": self._folder / READER,
            "model": config.reader_model or retriever,
            "batch-size": config.reader_batch_size,
            "passages-per-question": config.passages_per_question,
            "sequence-length": config.sequence_length,
            "learning-rate": config.reader_rate,
            "max-steps": config.reader_steps,
            "publish-steps": config.reader_publish_steps,
            "log-batch-step": min(10, config.reader_steps),
            "seed": config.seed,
        }
        with self._child(READER) as run:
            validate: dict[str, object] = {
                "run-id": run.id,
                "results": self._folder / f"{DEV}.json",
                "passages-per-question": max(config.top_docs),
                "sequence-length": config.sequence_length,
                "poll-seconds": config.poll_seconds,
            }
            tops = [word for count in config.top_docs for word in ("--eval-top-docs", count)]
            children, is_stopped = run_both(
                run,
                Command("reader-train", [*_flags(train), "--force"], trainer_variables),
                Command(
                    "reader-validate",
                    [*_flags(validate), *map(str, tops)],
                    validator_variables,
                ),
            )
            if is_stopped:
                raise KeyboardInterrupt
            check_ended(children, "the run shows what was published")
            return _best_and_curve(run, READER, f"em@{max(config.top_docs)}")

    def predictions(self) -> Mapping[str, Any]:
        """Answer the questions with the best reader."""
        config = self._config
        found = predict_answers(
            ReaderPredictConfig(
                reader=self._parts[READER]["best"],
                results=self._folder / f"{DEV}.json",
                output=self._folder / "predictions.json",
                eval_top_docs=(config.eval_top_docs,),
                passages_per_question=max(config.top_docs),
                sequence_length=config.sequence_length,
                tracking_uri=config.tracking_uri,
                force=True,
            )
        )
        return {str(measure): value for measure, value in found.items()}

    @contextmanager
    def _child(self, name: str) -> Iterator[TrackedRun]:
        """A run below this one; it has ended when the block ends."""
        run = self._run.create_child(name)
        try:
            yield run
        except BaseException as error:
            if not is_over(run.fetch()):
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _best_and_curve(run: TrackedRun, name: str, measure: str) -> dict[str, Any]:
    """The best checkpoint of a run by a measure, and the values of all checkpoints."""
    key = measure.replace("@", "_at_")
    best = find_best(run, f"{name}/{key}")
    mark_best(run, best)
    curve = [
        [checkpoint.step, recorded_values(checkpoint, name)] for checkpoint in run_checkpoints(run)
    ]
    return {
        "run": run.id,
        "best": best.checkpoint.uri,
        "step": best.checkpoint.step,
        "measure": key,
        "curve": [point for point in curve if point[1]],
    }


def _log_curves(run: TrackedRun, parts: FinishedParts) -> None:
    """Log both curves to the run itself, so that its page shows them, too."""
    for part in ("retriever", READER):
        for step, values in parts[part]["curve"]:
            measures = {key: value for key, value in values.items() if key not in TIMINGS}
            run.log_metrics({f"{part}/{key}": value for key, value in measures.items()}, int(step))
