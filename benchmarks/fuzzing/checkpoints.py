"""Published checkpoints: their files, their manifest, and their values on the server."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from mlflow import MlflowClient

from benchmarks.fuzzing import damage, odd
from benchmarks.fuzzing.case import Case, Kind, unprintable
from benchmarks.fuzzing.encoders import hurt, scores, sound, stray, templates
from mlflow_dr.files import file_sha256
from mlflow_dr.tracking.checkpoints import (
    DIRECTORY_TAG,
    MANIFEST_TAG,
    MODEL_TYPE,
    PRUNED_TAG,
    READY,
    STEP_TAG,
    publish,
    run_checkpoints,
)
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.results import PREFIX, failure_reason, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.status import progress_summary, status_lines, status_table
from mlflow_dr.tracking.validations import (
    chosen_metric,
    recorded_values,
    run_validations,
    subset_encoder_steps,
)

CONFIG = {
    "corpus": "0123456789abcdef",
    "topics": "fedcba9876543210",
    "split": "dev",
    "subset": "full",
    "measures": "mrr@10 ndcg@10",
    "depth": 10,
    "dtype": "fp32",
    "keep_own_id": False,
}
FIGURES = {"mrr_at_10": 0.5, "ndcg_at_10": 0.75, "seconds": 1.5, "passages": 7, "lag_seconds": 2.0}
OWNER = {"host": "here", "pid": 1, "room": "boot/1", "started": 5, "token": "0" * 32}
RECORD = json.dumps({"values": FIGURES, "written_ms": 1_700_000_000_000})
MORE = {
    PRUNED_TAG: "begun",
    DIRECTORY_TAG: "/nowhere/checkpoint-10",
    f"{PREFIX}val.failed": "because",
}
ADDED = (
    *(f"{PREFIX}val.claim.{number}" for number in ("9" * 22, "\u00b2", "", "01", "-1")),
    *(f"{PREFIX}x y/z", PREFIX, "mlflow_dr.x"),
)


@cache
def client() -> MlflowClient:
    """A real store (sqlite), which is used again if the process is restarted."""
    folder = Path(tempfile.gettempdir(), "fuzz-store")
    folder.mkdir(exist_ok=True)
    return connect(f"sqlite:///{folder}/mlflow.db")


def fresh_run(workdir: Path) -> TrackedRun:
    experiment = client().create_experiment(
        uuid.uuid4().hex, artifact_location=str(workdir / "artifacts")
    )
    return TrackedRun(client(), client().create_run(experiment))


def manifest(chance: Random, workdir: Path) -> Case:
    """A checkpoint's files damaged, files beside them, or a manifest that is damaged and sealed."""
    run = fresh_run(workdir)
    directory = workdir / "encoder"
    shutil.copytree(templates()["ours"], directory)
    publish(run, directory, 5)
    (checkpoint,) = run_checkpoints(run)
    location = Path(checkpoint.location.removeprefix("file://"))
    listed = location / "manifest.json"
    names = (listed.name, checkpoint.model_id, *json.loads(listed.read_text()))
    act = chance.randrange(8)
    if act < 2:
        _, how = hurt(chance, location)
    elif act == 2:
        how = stray(chance, location)
    elif act == 3:
        how = beside(chance, location)
    elif act == 4:
        tag, how = odd.word(chance, checkpoint.manifest)
        client().set_logged_model_tags(
            checkpoint.model_id, {MANIFEST_TAG: tag.encode("utf-8", "replace").decode()[:5000]}
        )
        how = f"its digest: {how}"
    else:
        values = json.loads(listed.read_text())
        if act == 5:
            listed.write_bytes(damage.raw(chance, listed.read_bytes())[0])
            how = "manifest of other bytes"
        elif act == 6:
            chosen = chance.choice(list(values))
            values[chance.choice(odd.PATHS)] = values[chosen]
            if chance.random() < 0.5:
                del values[chosen]
            how = "manifest with another name"
            listed.write_bytes(damage.dumped(chance, values, 1))
        else:
            values, how = damage.tree(chance, values)
            how = f"manifest: {how}"
            listed.write_bytes(damage.dumped(chance, values, 1))
        client().set_logged_model_tags(checkpoint.model_id, {MANIFEST_TAG: file_sha256(listed)})

    names = (*names, *(ascii(path)[1:-1] for path in odd.PATHS if path.strip(".")))

    def read() -> Any:
        (published,) = run_checkpoints(run)
        with checkpoint_files(published) as files:
            return scores(files)

    return Case(how, read, lambda: sound("ours"), names)


def beside(chance: Random, directory: Path) -> str:
    """Add a file that an encoder's loader would read, and that the manifest does not list."""
    act = chance.randrange(6)
    if act == 0:
        shutil.copytree(templates()["towers"] / "query", directory / "query")
        return "a tower of queries beside it"
    name, text = (
        ("special_tokens_map.json", '{"unk_token": "ships", "pad_token": "ships"}'),
        ("added_tokens.json", '{"ships": 3}'),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n"),
        (
            "adapter_config.json",
            json.dumps(
                {
                    "base_model_name_or_path": str(templates()["bare"]),
                    "peft_type": "LORA",
                    "r": 4,
                    "target_modules": ["query"],
                }
            ),
        ),
        ("chat_template.jinja", "{{ 1 }}"),
    )[act - 1]
    (directory / name).write_text(text)
    return f"{name} beside it"


class ServerValues(NamedTuple):
    """The values of a checkpoint and its run on the server, with one change.

    Attributes:
        section: tags, params or the run.
        key: the changed key.
        how: how it was changed.
        tags: tags of the checkpoint.
        params: params of the checkpoint.
        of_run: params of the run.
    """

    section: str
    key: str
    how: str
    tags: dict[str, str]
    params: dict[str, str]
    of_run: dict[str, str]


def changed_server_values(chance: Random) -> ServerValues:
    tags = {
        STEP_TAG: "10",
        MANIFEST_TAG: "0" * 64,
        f"{PREFIX}val.heartbeat": "1: 3",
        "mlflow_dr.best.val": "0.5",
    }
    params = {f"{PREFIX}val": RECORD, f"{PREFIX}val.claim.1": json.dumps(OWNER)}
    of_run = {f"{PREFIX}val": json.dumps(CONFIG), "dataset": "demo", "validation_split": "dev"}
    section = chance.choice(("tags", "tags", "params", "params", "more", "run"))
    if section == "more":
        key = chance.choice(list(MORE))
        tags[key], how = _changed(chance, MORE[key])
        if chance.random() < 0.5:
            del params[f"{PREFIX}val"]
        return ServerValues(section, key, how, tags, params, of_run)
    chosen = {"tags": tags, "params": params, "run": of_run}[section]
    key = chance.choice(list(chosen))
    if chance.random() < 0.15:
        added = chance.choice(ADDED)
        chosen[added] = chosen.pop(key) if chance.random() < 0.5 else chosen[key]
        return ServerValues(section, added, f"{key} also under it", tags, params, of_run)
    chosen[key], how = _changed(chance, chosen[key])
    return ServerValues(section, key, how, tags, params, of_run)


def server(chance: Random, workdir: Path) -> Case:
    """A changed tag or param of a checkpoint or its run."""
    run = fresh_run(workdir)
    section, key, how, tags, params, of_run = changed_server_values(chance)
    model(run, {STEP_TAG: "5", MANIFEST_TAG: "0" * 64}, {f"{PREFIX}val": RECORD}, 5)
    model(run, tags, params, 10)
    for name, value in of_run.items():
        client().log_param(run.id, name, value)

    def read() -> Any:
        checkpoints = run_checkpoints(run)
        mine = next(
            checkpoint
            for checkpoint in checkpoints
            if checkpoint.step == 5 and len(checkpoint.params) == 1
        )
        shown = []
        for checkpoint in checkpoints:
            for name in ("val", "x y/z", ""):
                shown += [
                    str(validation_state(checkpoint, name)),
                    failure_reason(checkpoint, name),
                    str(latest_claim(checkpoint, name)),
                    str(recorded_values(checkpoint, name)),
                ]
            shown.append(f"{checkpoint.is_fully_pruned} {checkpoint.is_pruned} {checkpoint.uri}")
        bound = run_validations(run)
        lines = status_lines(checkpoints, list(bound), time.time_ns() // 1_000_000)
        table = status_table(lines).splitlines()
        shown += table
        shown += [progress_summary(checkpoints, "val")]
        shown += map(
            str,
            (
                bound,
                chosen_metric(run, "val/mrr_at_10"),
                subset_encoder_steps(bound),
            ),
        )
        bad = [problem for line in table if (problem := unprintable(line))]
        others = [checkpoint.step for checkpoint in checkpoints if checkpoint is not mine]
        return [others, str(validation_state(mine, "val")), dict(recorded_values(mine, "val")), bad]

    step = tags.get(STEP_TAG, "")
    others = [int(step)] if re.fullmatch(r"\d{1,18}", step, re.ASCII) else []
    right: list[Any] = [others, "State.RECORDED", FIGURES, []]
    return Case(
        f"{section}: {key}: {how}",
        read,
        lambda: right,
        (key, key.removeprefix(PREFIX)),
        section == "run",
    )


def _changed(chance: Random, text: str) -> tuple[str, str]:
    """A changed text without lone surrogates, which no database accepts."""
    if text.startswith("{") and chance.random() < 0.7:
        values, how = damage.tree(chance, json.loads(text))
        made = json.dumps(values)
    else:
        made, how = odd.word(chance, text)
    made = made.encode("utf-8", "replace").decode()[:5000]
    return made or "x", f"{how}: {made!r:.60}"


def model(run: TrackedRun, tags: dict[str, str], params: dict[str, str], step: int) -> None:
    made = client().create_logged_model(
        run.experiment_id,
        name=f"step-{step}",
        source_run_id=run.id,
        tags=tags,
        params=params,
        model_type=MODEL_TYPE,
    )
    client().finalize_logged_model(made.model_id, READY)


def prepare() -> None:
    """Do what takes long the first time."""
    sound("ours")
    client().search_experiments()


KINDS = [Kind("manifest", manifest, 6, prepare), Kind("server", server, 8, prepare)]
