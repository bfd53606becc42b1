"""Checks of this machine: Python, devices, number formats, FAISS, the cache and the disks."""

from __future__ import annotations

import mmap
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from mlflow_dr.devices import TORCH_NAMES, resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.doctor.finding import Finding, Level
from mlflow_dr.errors import DeviceError, MlflowDrError, one_line
from mlflow_dr.files import atomic_write, cache_dir, nearest_existing, usable_cores
from mlflow_dr.terminal import byte_count

if TYPE_CHECKING:
    import torch

SECONDS_FOR_LOCK = 5.0
FEWEST_BYTES, FEW_BYTES = 1 << 30, 10 << 30  # free on a disk: commands fail, or soon will
SMALL_SHARED_MEMORY = 64 << 20  # Docker's default, too little for workers of the data loader
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu")
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}  # of a sum of 64 random products
VERSIONS = ("torch", "transformers", "mlflow", "sentence-transformers")


def check_python() -> Iterator[Finding]:
    """The interpreter, and whether what mlflow_dr needs is installed in versions that fit."""
    from packaging.requirements import Requirement

    bad = []
    for line in metadata.requires("mlflow_dr") or []:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            bad.append(f"{needed.name} is {installed}, not {needed.specifier}")
    if bad:
        yield Finding("Python", "fail", f"{'; '.join(bad)}: install with -c constraints.txt")
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable}), {versions}")


def check_devices() -> Iterator[Finding]:
    """The processor and each GPU, by a product of matrices in each number format."""
    import torch

    yield Finding("processor", "ok", f"{usable_cores()} cores, {_formats(resolve_device('cpu'))}")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "GPU",
                "warn",
                f"there is an NVIDIA driver that torch {torch.__version__} cannot use; install a "
                "build of torch for its version of CUDA",
            )
        else:
            yield Finding("GPU", "ok", "none: the processor does all work")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        level: Level = "ok" if free > total / 10 else "warn"
        advice = "" if level == "ok" else "; another process uses it, choose another by --device"
        yield Finding(
            f"cuda:{index}",
            level,
            f"{torch.cuda.get_device_name(index)}, {byte_count(free)} of {byte_count(total)} free, "
            f"{_formats(torch.device('cuda', index))}{advice}",
        )


def _formats(device: torch.device) -> str:
    """The number formats in which a device computes, and the one that `auto` chooses."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand((2, 64, 64), generator=generator, dtype=torch.float64)
    expected = left @ right
    working = []
    for name in TORCH_NAMES:
        try:
            kind = torch_dtype(resolve_dtype(name, device))
        except DeviceError:
            continue  # fp16 on a processor
        got = (left.to(device, kind) @ right.to(device, kind)).cpu().double()
        error = float(((got - expected) / expected).abs().max())
        if not error < TOLERANCES[name]:
            raise DeviceError(
                f"{device} multiplies {name} wrongly (relative error {error:.2g}); check the "
                "driver and the build of torch"
            )
        working.append(name)
    return f"{', '.join(working)} (auto is {resolve_dtype('auto', device)})"


def check_faiss() -> Iterator[Finding]:
    """The build of FAISS, by a search whose result is known."""
    import torch

    from mlflow_dr.retrieval.search import load_faiss, search_faiss

    builds = [name for name in FAISS_PACKAGES if _installed(name)]
    faiss = load_faiss()
    if len(builds) > 1:
        yield Finding(
            "FAISS",
            "fail",
            f"{' and '.join(builds)} share one import name and overwrite each other; uninstall "
            "all of them, then install one",
        )
        return
    vectors = torch.eye(8).repeat(2, 1)[:12]
    scores, positions = search_faiss(torch.eye(8)[:3], vectors, 2)
    if sorted(positions.flatten().tolist()) != [0, 1, 2, 8, 9, 10] or not bool((scores == 1).all()):
        raise DeviceError("FAISS finds wrong vectors; install it again")
    gpus = getattr(faiss, "get_num_gpus", int)()
    build = f"{builds[0]} " if builds else ""
    yield Finding("FAISS", "ok", f"{build}{faiss.__version__}, {gpus} GPUs; searches rightly")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_cache() -> Iterator[Finding]:
    """Write, lock, map and rename a file in the cache."""
    folder = cache_dir()
    existing = nearest_existing(folder)
    try:
        use_files(existing)
    except NotImplementedError as error:
        raise MlflowDrError(
            f"{existing}: its file system has no file locks ({error}); set MLFLOW_DR_CACHE to a "
            "folder of a local disk"
        ) from error
    except OSError as error:
        raise MlflowDrError(
            f"{existing}: files cannot be written, locked and mapped ({one_line(error)}); set "
            "MLFLOW_DR_CACHE to another folder"
        ) from error
    yield Finding("cache", "ok", f"{folder}{'' if folder.exists() else ' (not made yet)'}")


def use_files(folder: Path) -> None:
    """Write, lock, rename and map a file of a folder, and remove it.

    Raises:
        OSError: one of these fails.
    """
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as own:
        path = Path(own, "entry")
        with FileLock(f"{path}.lock", timeout=SECONDS_FOR_LOCK), atomic_write(path) as partial:
            partial.write_bytes(b"probe")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            if mapped[:] != b"probe":
                raise OSError("a mapped file is not what was written")


def check_disks() -> Iterator[Finding]:
    """The room that is left in the cache, for temporary files, and here."""
    places = {
        "cache": (nearest_existing(cache_dir()), "MLFLOW_DR_CACHE"),
        "temporary files": (Path(tempfile.gettempdir()), "TMPDIR"),
        "this directory": (Path.cwd(), "--output_dir"),
    }
    seen: dict[int, str] = {}
    for name, (folder, setting) in places.items():
        device = folder.stat().st_dev
        if device in seen:
            continue
        seen[device] = name
        free = shutil.disk_usage(folder).free
        level: Level = "ok" if free >= FEW_BYTES else "warn" if free >= FEWEST_BYTES else "fail"
        advice = "" if level == "ok" else f"; remove files (`mlflow-dr cache`), or set {setting}"
        yield Finding("disk", level, f"{byte_count(free)} free for {name} in {folder}{advice}")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total <= SMALL_SHARED_MEMORY:
        yield Finding(
            "shared memory",
            "warn",
            f"{byte_count(shutil.disk_usage(shared).total)}, too little for "
            "--dataloader_num_workers; start the container with --shm-size=8g",
        )
