"""The devices of JAX, the hosts that train together, and compiling for them."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mlflow_dr.errors import DeviceError, UsageError, one_line
from mlflow_dr.files import cache_dir
from mlflow_dr.jax_engine.loss import DEVICES

log = logging.getLogger(__name__)

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
POD_VARIABLE = "TPU_WORKER_HOSTNAMES"
"""Cloud TPU: the hosts of a pod, separated by commas."""
AUTO = "auto"
TPU_MEMORY = {
    "TPU v2": 8,
    "TPU v3": 16,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
}
"""Kind of a TPU -> GiB of memory: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm."""
SECONDS_BETWEEN_LOOKS = 0.1
HELD = ("already in use", "in use by", "Device or resource busy")


def find_devices() -> list[Any]:
    """All devices of all hosts, those of one host side by side.

    Raises:
        DeviceError: JAX cannot use them.
    """
    try:
        return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    except RuntimeError as error:
        text = str(error)
        if any(word in text for word in HELD):
            reason = "another process holds the TPU; end it (`sudo lsof /dev/accel* /dev/vfio/*`)"
        else:
            reason = "check JAX_PLATFORMS, or set JAX_PLATFORMS=cpu to train on the processor"
        raise DeviceError(f"JAX cannot use its devices: {reason} ({one_line(error)})") from error


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """The devices along one axis."""
    return Mesh(np.array(devices), (DEVICES,))


def join_hosts(coordinator: str | None, n_hosts: int | None, host_index: int | None) -> None:
    """Join the hosts of a pod, or those that `--coordinator` names, before devices are used.

    torch's processes, which share the data among themselves and agree when to stop, become the same
    as those of JAX, whatever torchrun's variables said.

    Args:
        coordinator: address and port of the first host; `auto` lets JAX find the hosts (Cloud TPU,
            Slurm, Kubernetes, MPI). None joins the hosts of a Cloud TPU pod only.
        n_hosts: number of hosts; None with `auto`.
        host_index: this host, counted from 0; None with `auto`.

    Raises:
        UsageError: one of the three is missing.
        DeviceError: the hosts do not find each other.
    """
    is_pod = len(os.environ.get(POD_VARIABLE, "").split(",")) > 1
    if coordinator is None and not is_pod:
        _as_one_process()
        return
    options: dict[str, Any] = {}
    if coordinator not in (None, AUTO):
        if n_hosts is None or host_index is None:
            raise UsageError(
                f"--coordinator {coordinator} needs --n_hosts and --host_index, or use "
                "--coordinator auto"
            )
        options = {
            "coordinator_address": coordinator,
            "num_processes": n_hosts,
            "process_id": host_index,
        }
    try:
        if not jax.distributed.is_initialized():
            jax.distributed.initialize(**options)
        count, index = jax.process_count(), jax.process_index()
        address = _first_host(coordinator) if count > 1 else ("", 0)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"the hosts do not find each other ({one_line(error)}); start the same command on "
            "every host, with the same --coordinator"
        ) from error
    if count == 1:
        _as_one_process()
        return
    variables = {"RANK": index, "LOCAL_RANK": 0, "WORLD_SIZE": count}
    variables |= dict(zip(("MASTER_ADDR", "MASTER_PORT"), address, strict=True))
    os.environ |= {name: str(value) for name, value in variables.items()}
    log.info("host %d of %d", index, count)


def _as_one_process() -> None:
    """Forget torchrun's variables: one process drives all devices of a host."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "--engine jax drives all devices by one process on each host; start it without "
            "torchrun, and name the hosts by --coordinator"
        )


def _first_host(coordinator: str | None) -> tuple[str, int]:
    """An address and a free port of the first host, which it tells all hosts."""
    message = np.zeros(5, np.int32)
    if jax.process_index() == 0:
        known = coordinator not in (None, AUTO)
        name = str(coordinator).rpartition(":")[0] if known else socket.gethostname()
        with socket.socket() as free:
            free.bind(("", 0))
            parts = socket.gethostbyname(name).split(".")
            message[:] = [*map(int, parts), free.getsockname()[1]]
    told = np.asarray(multihost_utils.broadcast_one_to_all(message)).tolist()
    return ".".join(map(str, told[:4])), int(told[4])


def keep_compiled() -> None:
    """Keep compiled functions in our cache folder, unless JAX has been given another one."""
    if CACHE_VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


def compiled(lowered: Any, what: str) -> Any:
    """Compile a function, and log the seconds.

    Compiling for a TPU takes up to minutes, in which Python cannot handle signals. So a thread
    compiles, and this one waits: Ctrl-C is answered at once.

    Args:
        lowered: what `jax.jit(...).lower(...)` gave.
        what: a name for the log.
    """
    began = time.perf_counter()
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(lowered.compile())
        except Exception as error:  # noqa: BLE001 - raised again below
            results.append(error)

    thread = threading.Thread(target=work, name="compile", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LOOKS)
    (result,) = results
    if isinstance(result, Exception):
        raise result
    log.info("compiled %s in %.1f s", what, time.perf_counter() - began)
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA could not get the memory that it asked for."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def memory_limit(device: Any) -> int | None:
    """Bytes of memory that a program can use on a device; None if that is not known.

    Devices on the processor share the memory of the machine.
    """
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(total // max(1, jax.local_device_count()))
    try:
        stats = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):  # a description of a TPU
        stats = {}
    size = TPU_MEMORY.get(device.device_kind)
    return stats.get("bytes_limit") or (size and size << 30)


def everywhere(value: np.ndarray, sharding: Any) -> Any:
    """An array that each device of each host has a copy of."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: Any) -> np.ndarray:
    """An array that each device has a copy of, in this host's memory."""
    return np.asarray(array.addressable_data(0))
