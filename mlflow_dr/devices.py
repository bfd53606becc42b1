"""Devices and number formats by name, and copies to and from a device.

Names are checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_dr import compat
from mlflow_dr.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np
    import torch

AUTO = "auto"
AMD, INTEL = "AuthenticAMD", "GenuineIntel"
"""Linux's names of those who make processors."""
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our name of each number format -> PyTorch's."""


def resolve_device(name: str = AUTO) -> torch.device:
    """The device of a name; `auto` is the first CUDA device, or the processor without one.

    Raises:
        DeviceError: no device has this name, or this machine does not have it.
    """
    import torch

    if name == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"device {name!r} is not a device; expected auto, cpu, cuda or cuda:<n>"
        ) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:<n>")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        has = "no CUDA device" if count == 0 else f"CUDA devices 0 to {count - 1}"
        raise DeviceError(f"device {name!r} does not exist: this machine has {has}; try auto")
    return torch.device("cuda", device.index or 0)


def resolve_devices(names: str = AUTO) -> list[torch.device]:
    """The devices of one name or of several between commas; they are all of one type.

    Raises:
        DeviceError: as `resolve_device`, or processors and CUDA devices together.
    """
    devices = [resolve_device(name) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise DeviceError(
            f"devices {names!r} are of two types, which round differently; use one type"
        )
    return devices


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> str:
    """The number format of a name: `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the hardware multiplies it faster (CUDA from Ampere on; processors with
    AMX, and AMD's with AVX512-BF16) and fp32 elsewhere.

    Args:
        name: one of these names, PyTorch's name (`float32`, `torch.bfloat16`) or a `torch.dtype`.
        device: where the encoder runs.

    Raises:
        DeviceError: no format has this name, or fp16 on a processor.
    """
    name = dtype_name(name)
    if name == AUTO:
        return "bf16" if _is_bf16_faster(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise DeviceError("dtype fp16 needs a CUDA device; on a processor use bf16 or fp32")
    return name


def dtype_name(name: object) -> str:
    """Our name of a number format, or `auto`; PyTorch's names are accepted, too.

    Raises:
        DeviceError: no format has this name.
    """
    text = str(name).removeprefix("torch.")
    ours = {theirs: ours for ours, theirs in TORCH_NAMES.items()}.get(text, text)
    if ours != AUTO and ours not in TORCH_NAMES:
        raise DeviceError(f"dtype {text[:40]!r}: expected {', '.join((AUTO, *TORCH_NAMES))}")
    return ours


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's number format for one of our names."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def _is_bf16_faster(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    has_amx, has_avx512 = compat.processor_instructions_for_bf16()
    # Intel's multiply bf16 by AVX512 at 0.6 times the speed of fp32, AMD's at twice the speed
    return has_amx or (has_avx512 and processor_vendor() != INTEL)


def is_onednn_faster(device: torch.device) -> bool:
    """Whether oneDNN multiplies matrices faster than what PyTorch uses by itself.

    It does on AMD's processors with AVX512, where MKL makes no use of it.
    """
    return device.type == "cpu" and processor_vendor() == AMD and compat.processor_has_avx512()


@cache
def processor_vendor() -> str:
    """Linux's name of who made the processor, such as `AuthenticAMD`; empty where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, "")


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device, without waiting for it."""
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class CopyStream:
    """Copies arrays to a device in a stream of its own, beside what the device computes.

    Any thread may copy, and another one use the copies.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, *arrays: np.ndarray) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy; the result gives the copies to what computes with them.

        The device then waits for them, but the host does not.
        """
        import torch

        if self._stream is None:
            return lambda: [on_device(array, self._device) for array in arrays]
        with torch.cuda.stream(self._stream):
            copies = [on_device(array, self._device) for array in arrays]
            copied = self._stream.record_event()

        def use() -> list[torch.Tensor]:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in copies:
                tensor.record_stream(current)  # its memory stays in use until that is done
            return copies

        return use


def begin_host_copy(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; a call of the result waits for the copy and gives it.

    A GPU is not waited for until then. A tensor on the host is not copied.
    """
    import torch

    copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # in page-locked memory
    if not tensor.is_cuda:
        return lambda: copy
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return copy

    return wait
