"""Random SIGKILLs of validators, trainer and server, and their effect on validation.

    python -m benchmarks.faults --only kills --rounds 50 --steps 1500

A trainer publishes checkpoints of a tiny encoder to a real MLflow server; validators follow. In
each round one of them is killed at a random moment and started again. In the end every checkpoint
must have exactly one point for each metric, equal to what an undisturbed validation gives.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from benchmarks.faulting.scene import MEASURES, points
from benchmarks.server import Server
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import State, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.resume import RUN_FILE
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator

COLLECTION = Path(__file__).parents[2] / "examples" / "sea"
PUBLISH_STEPS = 5
LONGEST_LIFE = 6.0
SECONDS_TO_END = 900
WRONG = ("duplicates", "lost", "mismatched values", "claims left", "temporary directories left")


@dataclass
class Command:
    """A command that is restarted until it succeeds.

    If the file `begun` exists, the command resumes its training.
    """

    argv: list[str]
    variables: dict[str, str]
    log: Path
    begun: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def keep_alive(self) -> bool:
        """Start the command if it is not running; returns whether it has succeeded."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            if code == 0:
                return True
        resumes = self.begun is not None and self.begun.exists()
        more = ["--resume_from_checkpoint"] if resumes else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow_dr", *self.argv, *more],
                env={**os.environ, **self.variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return False

    def kill(self) -> bool:
        """Send SIGKILL; returns whether the command was running."""
        if self.process is None or self.process.poll() is not None:
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return True


def trainer_argv(output: Path, steps: int) -> list[str]:
    flags = {
        "dataset": COLLECTION,
        "model": "tiny",
        "output_dir": output,
        "max_steps": steps,
        "publish_steps": PUBLISH_STEPS,
        "save_steps": PUBLISH_STEPS,
        "save_total_limit": 1000,
        "per_device_train_batch_size": 4,
        "logging_steps": 5,
        "train_n_passages": 1,
    }
    return ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def disturb(
    commands: dict[str, Command], server: Server, rounds: int, chance: random.Random
) -> Counter[str]:
    """Kill processes at random moments, one at a time, and restart each."""
    kills: Counter[str] = Counter()
    while sum(kills.values()) < rounds:
        time.sleep(chance.uniform(0, LONGEST_LIFE))
        ended = {name: command.keep_alive() for name, command in commands.items()}
        victim = chance.choice([*commands, "server"])
        if victim == "server":
            server.kill()
            time.sleep(chance.uniform(0, 2))
            server.start()
        elif ended[victim] or not commands[victim].kill():
            continue
        kills[victim] += 1
        if victim != "server":
            commands[victim].keep_alive()
        print(f"round {sum(kills.values())}: {victim}", flush=True)
        if all(ended.values()):
            print("all commands ended before the last round; increase --steps")
            break
    return kills


def ended(commands: dict[str, Command]) -> None:
    """Wait until all commands have succeeded."""
    deadline = time.monotonic() + SECONDS_TO_END
    while True:
        states = [command.keep_alive() for command in commands.values()]
        if all(states):
            return
        if time.monotonic() > deadline:
            raise SystemExit("the commands did not end in time; see the logs")
        time.sleep(0.5)


def stuck(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is claimed but neither done nor failed."""
    claim = latest_claim(checkpoint, "val")
    state = validation_state(checkpoint, "val")
    return claim is not None and state not in (State.DONE, State.FAILED)


def run(rounds: int, validators: int, steps: int, seed: int) -> bool:
    """Count the effects of random SIGKILLs; returns whether all counts of errors are 0."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, Server(Path(name)) as server:
        workdir = Path(name)
        (workdir / "tmp").mkdir()
        client = connect(server.uri)
        run_id = client.create_run("0").info.run_id
        variables = {
            "MLFLOW_TRACKING_URI": server.uri,
            "MLFLOW_RUN_ID": run_id,
            "MLFLOW_DR_CACHE": str(workdir / "cache"),
            "TMPDIR": str(workdir / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        os.environ["MLFLOW_DR_CACHE"] = variables["MLFLOW_DR_CACHE"]
        validate = ["validate", "--run-id", run_id, "--measures", MEASURES, "--poll-seconds", "0.5"]
        commands = {
            "trainer": Command(
                trainer_argv(workdir / "output", steps),
                variables,
                workdir / "trainer.log",
                workdir / "output" / RUN_FILE,
            ),
            **{
                f"validator {number}": Command(validate, variables, workdir / f"{number}.log")
                for number in range(1, validators + 1)
            },
        }
        start = time.monotonic()
        try:
            kills = disturb(commands, server, rounds, chance)
            ended(commands)
        finally:
            for command in commands.values():
                command.kill()
        is_good = report(client, run_id, kills, workdir)
        print(f"{time.monotonic() - start:.0f} s, {steps} steps, {validators} validators")
    return is_good


def report(client: MlflowClient, run_id: str, kills: Counter[str], workdir: Path) -> bool:
    """Print the counts, compared with an undisturbed validation; returns whether all is well."""
    run = TrackedRun(client, client.get_run(run_id))
    ready = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready]
    claims = [claim for checkpoint in ready if (claim := latest_claim(checkpoint, "val"))]
    calm_config = ValidateConfig(measures=MEASURES, name="calm", follow=False)
    run_validator(FollowedRun(run), calm_config)
    disturbed, calm = points(client, run_id, "val"), points(client, run_id, "calm")
    steps = Counter(checkpoint.step for checkpoint in ready)
    counts = {
        "kills": sum(kills.values()),
        "checkpoints": len(ready),
        "takeovers": sum(claim.attempt - 1 for claim in claims),
        "duplicates": sum(steps.values())
        - len(steps)
        + sum(len(values) - 1 for by_step in disturbed.values() for values in by_step.values()),
        "lost": sum(step not in by_step for by_step in disturbed.values() for step in steps),
        "mismatched values": sum(
            values != calm[metric].get(step)
            for metric, by_step in disturbed.items()
            for step, values in by_step.items()
        ),
        "claims left": sum(map(stuck, ready)),
        "temporary directories left": len(list((workdir / "tmp").glob("mlflow_dr-scratch-*"))),
    }
    print("; ".join(f"{what} {count}" for what, count in kills.items()))
    print(", ".join(f"{what} {count}" for what, count in counts.items()))
    return not any(counts[what] for what in WRONG)
