"""Caches that are damaged before or while validators use them."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.faulting.process import Process, all_ended
from benchmarks.faulting.scene import METRICS, STARTS, Row, Scene, merged, points
from mlflow_dr.tracking.runs import TrackedRun

SECONDS_TO_BEGIN = 90.0
AT_ONCE = 3  # validators

Damage = Callable[[Path, random.Random], None]


def damaged_cache(scene: Scene, rate: float, seed: int) -> Row:
    """Validators that start with a damaged cache; in each cache another file is damaged."""
    chance = random.Random(seed)
    whole = scene.workdir / "cache"
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if _is_content(path)]
    steps = scene.steps[:2]
    rows: list[Row] = []
    for first in range(0, len(files), AT_ONCE):
        started: list[tuple[TrackedRun, dict[int, str], Process]] = []
        for number, name in enumerate(files[first : first + AT_ONCE], start=first):
            cache = scene.workdir / f"cache-{number}"
            shutil.copytree(whole, cache)
            how = chance.choice(list(DAMAGES))
            DAMAGES[how](cache / name, chance)
            run = scene.new_run(f"cache {number}")
            sound = scene.publish(run, steps)
            scene.client.set_terminated(run.id)
            shown = f"{name.parts[0]} {name.name} {how}"
            variables = {"MLFLOW_DR_CACHE": str(cache)}
            started.append((run, sound, scene.validator(run, shown, variables, starts=2)))
        seconds = all_ended([validator for _, _, validator in started])
        rows += [
            scene.row("", run, sound, [validator], seconds / len(started))
            for run, sound, validator in started
        ]
    return merged("damaged cache at the start", rows)


def cache_damaged_meanwhile(scene: Scene, rate: float, seed: int) -> Row:
    """Damage the cache of each validator after its first checkpoint."""
    chance = random.Random(seed)
    start = time.monotonic()
    started: list[tuple[TrackedRun, dict[int, str], Process]] = []
    caches: list[tuple[Path, Damage]] = []
    for how, damage in {**DAMAGES, "removed": lambda path, _: path.unlink()}.items():
        cache = scene.workdir / f"cache-{how}"
        shutil.copytree(scene.workdir / "cache", cache)
        caches.append((cache, damage))
        run = scene.new_run(f"cache {how} meanwhile")
        variables = {"MLFLOW_DR_CACHE": str(cache)}
        validator = scene.validator(run, how, variables, starts=STARTS)
        started.append((run, scene.publish(run, scene.steps[:1]), validator))
        validator.start()
    for (run, sound, validator), (cache, damage) in zip(started, caches, strict=True):
        while not points(scene.client, run.id, "val")[METRICS[0]]:
            if validator.has_ended() or time.monotonic() - start > SECONDS_TO_BEGIN:
                break
            time.sleep(0.1)
        for path in sorted(cache.rglob("*")):
            if _is_content(path):
                damage(path, chance)
        sound |= scene.publish(run, scene.steps[1:3])
        scene.client.set_terminated(run.id)
    all_ended([validator for _, _, validator in started])
    seconds = (time.monotonic() - start) / len(started)
    rows = [scene.row("", run, sound, [validator], seconds) for run, sound, validator in started]
    return merged("cache damaged meanwhile", rows)


def _is_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and path.suffix != ".lock"


def _flip(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        position = chance.randrange(path.stat().st_size)
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def _halve(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _blank(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


DAMAGES: Mapping[str, Damage] = {
    "flipped": _flip,
    "halved": _halve,
    "blanked": _blank,
}
