"""Faults of the network, of a validator's machine and of checkpoints, each among sound ones."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.store.artifact import artifact_repository_registry

from benchmarks.faulting.cache_faults import cache_damaged_meanwhile, damaged_cache
from benchmarks.faulting.kills import PUBLISH_STEPS, trainer_argv
from benchmarks.faulting.malformed import MALFORMED
from benchmarks.faulting.process import Process, all_ended
from benchmarks.faulting.proxy import Fault, Proxy
from benchmarks.faulting.scene import STARTS, Row, Scene
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun

TIMEOUT = "2"  # seconds until a client's request times out
DELAY = 3.0
LOGIN_RATE = 0.15
TRAINING_STEPS = 40
HEAD_START = 12.0  # seconds by which the failing validators start earlier
DISK_BYTES = 1 << 20  # bytes; smaller than a checkpoint
CACHE_DISK_BYTES = "8192"  # bytes; smaller than the cached collection
TINY_DISK = (
    *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size="$BYTES" tmpfs "$TINY_DISK" && exec "$@"',
    "sh",
)
SMALL_FILES = ("sh", "-c", f'ulimit -f {DISK_BYTES // 1024} && exec "$@"', "sh")
PLUGIN = """
import os
from urllib.parse import urlsplit

from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository


class FaultStore(LocalArtifactRepository):
    def __init__(self, artifact_uri, *args, **kwargs):
        import faultstore_sdk

        super().__init__("file://" + urlsplit(artifact_uri).path, *args, **kwargs)

    def _download_file(self, remote_file_path, local_path):
        if "FAULTSTORE_PASSWORD" not in os.environ:
            raise RuntimeError("Unable to locate credentials")
        return super()._download_file(remote_file_path, local_path)
"""


def proxied(scene: Scene, rate: float, seed: int) -> Row:
    """Two validators behind a proxy that disturbs a share of the answers in every way."""
    return _behind(scene, f"proxy, {rate:.0%} in every way", rate, tuple(Fault), seed)


def trainer_behind(scene: Scene, rate: float, seed: int) -> Row:
    """A trainer and two validators behind a proxy; an undisturbed validator runs afterwards."""
    run = TrackedRun(scene.client, scene.client.create_run("0"))
    cache = {"MLFLOW_DR_CACHE": str(scene.workdir / "trainer's cache")}
    behind = {"MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT, **cache}
    with Proxy(scene.server.uri, rate, seed=seed, delay=DELAY) as proxy:
        variables = {**scene.variables(proxy.uri), **behind, "MLFLOW_RUN_ID": run.id}
        argv = trainer_argv(scene.workdir / "output", TRAINING_STEPS)
        trainer = Process(argv, variables, scene.workdir / "trainer.log", "trainer")
        validators = [
            scene.validator(run, f"{number}", behind, proxy.uri, starts=STARTS) for number in (1, 2)
        ]
        seconds = all_ended([trainer, *validators])
    ready = {
        checkpoint.step: checkpoint.model_id
        for checkpoint in run_checkpoints(run)
        if checkpoint.ready
    }
    flags = ["--name", "undisturbed", "--once"]
    all_ended([scene.validator(run, "undisturbed", cache, more_flags=flags)])
    scenario = f"trainer and validators, {rate:.0%} in every way"
    row = scene.row(scenario, run, ready, [trainer, *validators], seconds, "undisturbed")
    row.lost += sum(step not in ready for step in range(0, TRAINING_STEPS + 1, PUBLISH_STEPS))
    row.notes += [f"run {scene.client.get_run(run.id).info.status}", _faults(proxy)]
    return row


def login_page(scene: Scene, rate: float, seed: int) -> Row:
    """Two validators behind a proxy that answers some requests with a login page."""
    return _behind(scene, f"login page, {LOGIN_RATE:.0%}", LOGIN_RATE, (Fault.LOGIN,), seed)


def without_modules(scene: Scene, rate: float, seed: int) -> Row:
    """Three validators that cannot reach the artifact store, then a sound one.

    One has no plugin for the store, one lacks a module of the plugin, one has no password.
    """
    root = scene.workdir / "faultstore"
    plugin, module = root / "plugin", root / "module"
    about = plugin / "faultstore-1.0.dist-info"
    for folder in (about, module, root / "store"):
        folder.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faultstore\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[mlflow.artifact_repository]\nfaultstore = faultstore:FaultStore\n"
    )
    (plugin / "faultstore.py").write_text(PLUGIN)
    (module / "faultstore_sdk.py").write_text("")
    artifact_repository_registry._artifact_repository_registry.register(
        "faultstore", _local_repository
    )
    run = scene.new_run("modules", store=f"faultstore://{root / 'store'}")
    sound = scene.publish(run)
    scene.client.set_terminated(run.id)
    paths = {
        "no plugin": [],
        "no module": [plugin],
        "no password": [plugin, module],
        "sound": [plugin, module],
    }
    made = {
        name: scene.validator(
            run,
            name,
            {
                "PYTHONPATH": ":".join(map(str, [Path(__file__).parents[2], *more])),
                **({"FAULTSTORE_PASSWORD": "1"} if name == "sound" else {}),
            },
            expected=0 if name == "sound" else None,
        )
        for name, more in paths.items()
    }
    return _sound_one_last(scene, "validators without modules", run, sound, made)


def without_disk_space(scene: Scene, rate: float, seed: int) -> Row:
    """Three validators that run out of disk space, then a sound one.

    One has a limit on the size of files, one has a full temporary directory, one a full cache.
    """
    run = scene.new_run("room")
    sound = scene.publish(run)
    scene.client.set_terminated(run.id)
    tiny = scene.workdir / "tiny"
    tiny.mkdir()
    here = {"TINY_DISK": str(tiny), "BYTES": str(DISK_BYTES)}
    made = {"small files": scene.validator(run, "small files", before=SMALL_FILES, expected=1)}
    notes = []
    if subprocess.run([*TINY_DISK, "true"], env=here, capture_output=True).returncode:
        notes = ["full disks were not tested: `unshare` may not mount here"]
    else:
        full_disks = {"full TMPDIR": {**here, "TMPDIR": str(tiny)}}
        full_disks["full cache"] = {**here, "MLFLOW_DR_CACHE": str(tiny), "BYTES": CACHE_DISK_BYTES}
        for name, variables in full_disks.items():
            made[name] = scene.validator(run, name, variables, before=TINY_DISK, expected=1)
    made["sound"] = scene.validator(run, "sound")
    row = _sound_one_last(scene, "validators without disk space", run, sound, made)
    row.notes += notes
    return row


def malformed_among_sound(scene: Scene, rate: float, seed: int) -> Row:
    """Malformed checkpoints, each between two sound ones; validators of run and experiment."""
    run = scene.new_run("malformed")
    sound: dict[int, str] = {}
    malformed: dict[str, str] = {}
    left = list(MALFORMED.items())
    each = -(-len(left) // len(scene.steps))
    for step in scene.steps:
        for number, (name, make) in enumerate(left[:each], start=1):
            directory = scene.workdir / "malformed" / name
            shutil.copytree(scene.encoder(step), directory)
            malformed[name] = make(run, directory, step - 10 + number)
        del left[:each]
        sound |= scene.publish(run, [step])
    scene.client.set_terminated(run.id)
    validators = [
        scene.validator(run, "of the run", expected=1),
        scene.validator(run, "of the experiment", expected=1, of_experiment=True),
    ]
    seconds = all_ended(validators)
    row = scene.row("malformed among sound ones", run, sound, validators, seconds)
    tags = {name: scene.client.get_logged_model(key).tags for name, key in malformed.items()}
    failed = [name for name, tag in tags.items() if "mlflow_dr.validation.val.failed" in tag]
    others = ", ".join(name for name in malformed if name not in failed)
    row.notes.append(f"{len(failed)} of {len(malformed)} malformed are FAILED; not: {others}")
    return row


SCENARIOS: Mapping[str, Callable[[Scene, float, int], Row]] = {
    "proxy": proxied,
    "login": login_page,
    "trainer": trainer_behind,
    "modules": without_modules,
    "room": without_disk_space,
    "cache": damaged_cache,
    "running-cache": cache_damaged_meanwhile,
    "malformed": malformed_among_sound,
}


def _behind(scene: Scene, scenario: str, rate: float, faults: Sequence[Fault], seed: int) -> Row:
    run = scene.new_run(scenario)
    sound = scene.publish(run)
    scene.client.set_terminated(run.id)
    variables = {"MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT}
    with Proxy(scene.server.uri, rate, faults, seed, DELAY) as proxy:
        validators = [
            scene.validator(run, f"{number}", variables, proxy.uri, starts=STARTS)
            for number in (1, 2)
        ]
        seconds = all_ended(validators)
    row = scene.row(scenario, run, sound, validators, seconds)
    row.notes.append(_faults(proxy))
    return row


def _faults(proxy: Proxy) -> str:
    made = ", ".join(f"{fault.name.lower()} {count}" for fault, count in proxy.faults.items())
    return f"{proxy.requests} requests: {made}"


def _sound_one_last(
    scene: Scene,
    scenario: str,
    run: TrackedRun,
    sound: Mapping[int, str],
    validators: Mapping[str, Process],
) -> Row:
    """Start the failing validators first, then the sound one; count the results."""
    start = time.monotonic()
    for name, validator in validators.items():
        if name != "sound":
            validator.start()
    time.sleep(HEAD_START)
    all_ended(list(validators.values()))
    return scene.row(scenario, run, sound, list(validators.values()), time.monotonic() - start)


def _local_repository(artifact_uri: str, *args: object, **kwargs: object) -> object:
    """The artifact store of the plugin, for the publisher."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return LocalArtifactRepository("file://" + urlsplit(artifact_uri).path)
