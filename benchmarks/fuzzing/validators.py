"""A validator of a run that has a malformed checkpoint and a sound one."""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import odd
from benchmarks.fuzzing.case import Case, Kind, printed, unprintable
from benchmarks.fuzzing.checkpoints import beside, client, fresh_run
from benchmarks.fuzzing.collections import beir_folder
from benchmarks.fuzzing.encoders import hurt, stray
from benchmarks.fuzzing.templates import templates
from mlflow_dr.errors import MlflowDrError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.checkpoints import STEP_TAG, publish, run_checkpoints
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.manifest import write_manifest
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator

MEASURES = parse_measures("mrr@10 ndcg@10")
SOUND, OTHER = 5, 10


def figures(run: TrackedRun, step: int) -> dict[str, list[float]]:
    """Points of each measure at a step."""
    return {
        measure.metric: [
            point.value
            for point in client().get_metric_history(run.id, f"val/{measure.metric}")
            if point.step == step
        ]
        for measure in MEASURES
    }


def validate(run: TrackedRun, folder: Path) -> str:
    """Validate once; returns what is wrong with the error line, if there is one."""
    config = ValidateConfig(
        measures=" ".join(map(str, MEASURES)),
        device="cpu",
        dtype="fp32",
        dataset=str(folder),
        split="dev",
        follow=False,
    )
    try:
        run_validator(FollowedRun(run), config, sleep=lambda seconds: None)
    except MlflowDrError as error:
        return unprintable(printed(error))
    return ""


@cache
def undisturbed() -> dict[str, list[float]]:
    """The figures of the sound checkpoint without a malformed one."""
    folder = templates()["ours"].parent / "alone"
    shutil.rmtree(folder, ignore_errors=True)
    beir_folder(folder / "set")
    run = fresh_run(folder)
    shutil.copytree(templates()["ours"], folder / "sound")
    publish(run, folder / "sound", SOUND)
    validate(run, folder / "set")
    made = figures(run, SOUND)
    if any(len(values) != 1 for values in made.values()):
        raise ValueError(f"the undisturbed run has {made}")
    return made


def validator(chance: Random, workdir: Path) -> Case:
    right = undisturbed()
    beir_folder(workdir / "set")
    run = fresh_run(workdir)
    for step in (SOUND, OTHER):
        shutil.copytree(templates()["ours"], workdir / str(step))
    act = chance.randrange(4)
    if act == 0:  # before it is published, so that its manifest agrees
        _, how = hurt(chance, workdir / str(OTHER))
    publish(run, workdir / str(SOUND), SOUND)
    with suppress(MlflowDrError):  # what is damaged before may be refused
        publish(run, workdir / str(OTHER), OTHER)
    victims = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == OTHER]
    directory = Path(victims[0].location.removeprefix("file://")) if victims else workdir
    if act == 1:
        _, how = hurt(chance, directory)
    elif act == 2:
        how = stray(chance, directory) if chance.random() < 0.5 else beside(chance, directory)
        if chance.random() < 0.3:
            write_manifest(directory)
            how += ", and in the manifest"
    elif act == 3:
        (victim,) = victims
        tags = {**victim.tags, "mlflow_dr.pruned": "begun", "mlflow_dr.directory": "/nowhere"}
        key = chance.choice([STEP_TAG, *tags])
        value, how = odd.word(chance, tags[key])
        value = value.encode("utf-8", "replace").decode()[:5000] or "x"
        client().set_logged_model_tags(victim.model_id, {key: value})
        how = f"{key} {how}: {value!r:.60}"

    def read() -> Any:
        ended = validate(run, workdir / "set")
        nothing: dict[str, list[float]] = {name: [] for name in right}
        # what was damaged before it was published may well be another encoder
        agrees = act == 0 or figures(run, OTHER) in (right, nothing)
        return [figures(run, SOUND), agrees, ended]

    return Case(f"{act}: {how}", read, lambda: [right, True, ""], (), refusable=False)


KINDS = [Kind("validator", validator, 2, undisturbed)]
