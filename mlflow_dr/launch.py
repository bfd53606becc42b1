"""A trainer and a validator side by side, as two processes of one run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, TYPE_CHECKING, NamedTuple

import psutil

from mlflow_dr.engines.opening import RAY, check_devices_and_dtype
from mlflow_dr.errors import ChildError, DeviceError, MlflowDrError, UsageError
from mlflow_dr.files import scratch, usable_cores
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.client import URI_VARIABLE, connect, tracking_uri
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun, find_run, is_over, open_run
from mlflow_dr.tracking.status import curve_summary, report_hint
from mlflow_dr.tracking.validations import MAIN_PARAM
from mlflow_dr.validation.config import RunConfig

if TYPE_CHECKING:
    from mlflow_dr.training.arguments import TrainingRequest

log = logging.getLogger(__name__)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SECONDS_BETWEEN_CHECKS = 0.2
SECONDS_TO_STOP = 60.0
LOWER_PRIORITY = 10
GPUS = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


def launch(config: RunConfig, training: Sequence[str], run: TrackedRun | None = None) -> TrackedRun:
    """Train and validate; returns when both have ended.

    Args:
        config: what the validator does, and how many GPUs train.
        training: flags of `mlflow-dr train`; the collection that they name is opened first, so that
            what must be built is built once.
        run: what both write to; as `open_run` when None.

    Returns:
        The run.

    Raises:
        UsageError: a flag or value that the trainer or the validator refuses, or nothing to resume.
        DeviceError: fewer GPUs than training processes.
        ChildError: the trainer or the validator ended with an error; its exit code is theirs.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when both have ended.
    """
    trainer_variables, validator_variables, device = share_machine(trainers=config.gpus)
    # Ray has devices of its own
    validation = config.validation(**({} if config.engine == RAY else {"device": device}))
    name = validation.all_validations[0].name
    check_devices_and_dtype(config.engine, device, config.dtype)
    request, validated, resumed = _checked_training(training, config.gpus)
    validation = validation.replaced(dataset=validated)
    before = None
    if run is None:
        from mlflow_dr.training.run_params import run_name

        client = connect(config.tracking_uri or request.publish.tracking_uri)
        before = find_run(client, resumed).seen if resumed else None
        experiment = config.experiment_name or request.publish.experiment_name
        run = open_run(client, experiment, resumed, request.trainer.run_name, run_name(request))
    if not config.keep_up:
        run.set_param_once(MAIN_PARAM, name)
    validation = validation.replaced(run_id=run.id)
    with scratch() as directory:
        directory.mkdir()
        file = directory / "validate.json"
        file.write_text(validation.model_dump_json(exclude_unset=True), encoding="utf-8")
        train = Command("train", training, trainer_variables, config.gpus)
        validate = Command("validate", ["--config", str(file)], validator_variables)
        children, is_stopped = run_both(run, train, validate)
    if before is not None and is_over(before) and children[0].code == UsageError.exit_code:
        run.finish(before.info.status, before.info.end_time)  # the trainer refused to resume it
    measures = parse_measures(config.measures)
    _print(curve_summary(run, name, [measure.metric for measure in measures]))
    if is_stopped:
        raise KeyboardInterrupt
    hint = f"`mlflow-dr validate --run-id {run.id}` validates what is missing"
    check_ended(children, f"published checkpoints stay: {hint}")
    _write_report(run)
    return run


def _write_report(run: TrackedRun) -> None:
    """Keep a report with the run, and say where it is; a run without figures has none."""
    from mlflow_dr.report.contents import read_report
    from mlflow_dr.report.writing import log_report

    try:
        log_report(read_report(run))
        _print(report_hint(run))
    except MlflowDrError as error:  # the training itself has ended well
        log.warning("no report was written: %s", error)


class Command(NamedTuple):
    """A command of ours that runs as a process.

    Attributes:
        name: such as `train`.
        flags: of the command.
        variables: environment variables beside our own.
        processes: more than one are started by torchrun.
    """

    name: str
    flags: Sequence[str]
    variables: Mapping[str, str]
    processes: int = 1


def run_both(run: TrackedRun, train: Command, validate: Command) -> tuple[list[Child], bool]:
    """Run a trainer and a validator until both have ended.

    Args:
        run: what both write to.
        train: the trainer.
        validate: the validator; on a processor the trainer comes first.

    Returns:
        The two processes, and whether Ctrl-C or SIGTERM stopped them.
    """
    with _Stop() as stop:
        trainer, validator = (Child.start(command, run) for command in (train, validate))
        if not validate.variables.get(GPUS):
            with suppress(psutil.NoSuchProcess):  # `_wait` reports it if it ended
                psutil.Process(validator.process.pid).nice(LOWER_PRIORITY)
        _wait(run, trainer, validator, stop)
    return [trainer, validator], stop.received is not None


def check_ended(children: Sequence[Child], hint: str) -> None:
    """Refuse children that ended with an error.

    Args:
        children: those that have ended.
        hint: what to do.

    Raises:
        ChildError: the trainer or the validator ended with an error; its exit code is theirs.
    """
    failed = [child for child in children if child.failed]
    if failed:
        names = " and ".join(child.command for child in failed)
        error = ChildError(f"{names} ended with an error, which is shown above; {hint}")
        codes = [child.code for child in failed if child.code > 0]
        error.exit_code = codes[0] if codes else error.exit_code
        raise error


def _checked_training(
    training: Sequence[str], processes: int
) -> tuple[TrainingRequest, str, str | None]:
    """What a training's flags say; what would be refused is refused before a run is created.

    Returns:
        The request, the collection or suite that validators search, and the run that it resumes.
    """
    from mlflow_dr.training import resume
    from mlflow_dr.training.data import validated_dataset
    from mlflow_dr.training.encoder_setup import check_encoder
    from mlflow_dr.training.parsing import parse_training

    request = parse_training(training, processes)
    validated = validated_dataset(request.data)
    trainer, output = request.trainer, request.output
    resumption = resume.find_resumption(output, trainer.resume_from_checkpoint)
    if resumption is None:
        model = request.model
        check_encoder(model.model_name_or_path, request.publish.tracking_uri, model.cache_dir)
    with resume.claimed_output(output, resumption, request.saves, trainer.overwrite_output_dir):
        pass
    return request, validated, resumption.run_id if resumption else None


@dataclass
class Child:
    """One process, its output passed on line by line."""

    command: str
    process: subprocess.Popen[str]
    reader: threading.Thread
    reported: bool = False
    is_run_ended: bool = False

    @classmethod
    def start(cls, command: Command, run: TrackedRun) -> Child:
        """Start `mlflow-dr <command>` in a process group of its own, so that we get Ctrl-C.

        Args:
            command: what it does.
            run: what it writes to.
        """
        module = ["-m", "mlflow_dr", command.name]
        if command.processes > 1:
            module = [*TORCHRUN, "--nproc-per-node", str(command.processes), *module]
        process = subprocess.Popen(
            [sys.executable, "-u", *module, *command.flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={
                **os.environ,
                **command.variables,
                RUN_VARIABLE: run.id,
                URI_VARIABLE: tracking_uri(),
                # between passing SIGTERM on to its children and killing them (torch 2.13; where it
                # does not know this, half a minute)
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(SECONDS_TO_STOP)),
                "PYTHONUNBUFFERED": "1",  # of torchrun's own children, too
            },
        )
        passed_on = (process.stdout, command.name)
        reader = threading.Thread(target=_pass_on, args=passed_on, daemon=True)
        reader.start()
        return cls(command.name, process, reader)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.process.poll() not in (None, 0)

    @property
    def code(self) -> int:
        """Its exit code; below 0 for a signal."""
        return self.process.wait()

    def report_death(self) -> None:
        """Print once, if it has failed, how it ended; its own error has been passed on."""
        if self.failed and not self.reported:
            self.reported = True
            self.reader.join(timeout=2)  # its error comes first
            code = self.process.returncode
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            _print(f"{self.command} ended with {how}")


class _Stop:
    """The signal that asks us to stop: cleanly at first, at once if it comes again.

    Ctrl-C on `mlflow run` reaches us twice, as the terminal's SIGINT and as MLflow's SIGTERM.
    Signals reach the main thread alone; in any other thread nothing is done.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deadline = float("inf")

    def __enter__(self) -> _Stop:
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            self.deadline = time.monotonic() + SECONDS_TO_STOP
        elif self.received == number:
            self.deadline = 0.0


def _wait(run: TrackedRun, trainer: Child, validator: Child, stop: _Stop) -> None:
    """Wait for both, report one that fails at once, and pass on a request to stop."""
    children = (trainer, validator)
    has_signalled = False
    try:
        while not (trainer.ended and validator.ended):
            if stop.received and not has_signalled:
                has_signalled = True
                _print("stopping: the trainer after its step, the validator now; again: at once")
                _signal(children, signal.SIGTERM)
            if time.monotonic() > stop.deadline:
                _signal(children, signal.SIGKILL)
            _check_children(run, children, stop)
            time.sleep(SECONDS_BETWEEN_CHECKS)
        _check_children(run, children, stop)
        for child in children:
            child.reader.join(timeout=5)
    finally:
        _signal(children, signal.SIGKILL)


def _check_children(run: TrackedRun, children: tuple[Child, Child], stop: _Stop) -> None:
    """Report a child that has failed, and end the run for a trainer that could not do so."""
    if not stop.received:
        for child in children:
            child.report_death()
    trainer = children[0]
    if trainer.failed and not trainer.is_run_ended:
        trainer.is_run_ended = True
        if not is_over(run.fetch()):
            run.finish("KILLED" if stop.received else "FAILED")


def _signal(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        if child.ended:
            continue
        if number == signal.SIGKILL:  # nothing passes this one on
            _kill_descendants(child.process.pid)
        child.process.send_signal(number)


def _kill_descendants(pid: int) -> None:
    """Kill the processes that a process has started; torchrun's have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        for descendant in descendants:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()


def _pass_on(stream: IO[str], what: str) -> None:
    for line in stream:
        _print(f"[{what}] {line.rstrip()}")


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the children's output is ours


def share_machine(
    gpus: Sequence[str] | None = None, cores: int | None = None, trainers: int = 1
) -> tuple[dict[str, str], dict[str, str], str]:
    """Divide a machine between a trainer and a validator.

    Each training process gets one GPU, and the validator gets the last GPU if one is left. If none
    is left, the validator runs on the processor: on a quarter of the cores if the trainer runs
    there, too, and otherwise on all cores but two for each training process.

    Args:
        gpus: names of the GPUs as in CUDA_VISIBLE_DEVICES; this machine's when None.
        cores: number of cores; this machine's when None.
        trainers: number of training processes.

    Returns:
        Environment variables of the trainer and of the validator, and the validator's `--device`.

    Raises:
        DeviceError: several training processes have fewer GPUs.
    """
    gpus = visible_gpus() if gpus is None else gpus
    cores = cores or usable_cores()
    if trainers > 1 and trainers > len(gpus):
        raise DeviceError(
            f"--gpus {trainers}, but this machine has {len(gpus)}; start `torchrun -m mlflow_dr "
            "train` yourself to train in several processes on one device"
        )
    if len(gpus) > trainers:
        training = ",".join(gpus[:trainers])
        return {GPUS: training}, {GPUS: gpus[-1]}, "cuda:0"
    validator = max(1, cores - 2 * trainers) if gpus else max(1, cores // 4)
    trainer = max(1, (cores - validator) // trainers)
    return {THREADS: str(trainer)}, {THREADS: str(validator), GPUS: ""}, "cpu"


def visible_gpus() -> list[str]:
    """The GPUs that CUDA programs see on this machine."""
    import torch

    count = torch.cuda.device_count()
    chosen = [name for name in os.environ.get(GPUS, "").split(",") if name]
    return chosen[:count] if chosen else [str(index) for index in range(count)]
