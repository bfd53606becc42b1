"""Devices and number formats by name, checked before any work begins."""

from __future__ import annotations

import torch

from mlflow_dr.engines.formats import AUTO, TORCH_NAMES, format_name
from mlflow_dr.errors import DeviceError

__all__ = ["AUTO", "DTYPES", "resolve_device", "resolve_dtype"]

DTYPES: dict[str, torch.dtype] = {
    ours: getattr(torch, theirs) for ours, theirs in TORCH_NAMES.items()
}


def resolve_device(name: str = AUTO) -> torch.device:
    """The device that a name stands for; `auto` is the first CUDA device, else the processor.

    Raises:
        DeviceError: the name is no device's, or this machine has no such device.
    """
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


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> str:
    """The number format of the encoder: `fp32`, `bf16` or `fp16`.

    PyTorch's names (`float32`, `torch.bfloat16`) and its formats themselves are taken, too.

    `auto` is bf16 where the hardware multiplies it natively (CUDA from Ampere on; processors with
    AMX or AVX512-BF16), else fp32.

    Raises:
        DeviceError: no such format, or fp16 on a processor.
    """
    name = format_name(name)
    if name == AUTO:
        return "bf16" if _native_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise DeviceError("dtype fp16 needs a CUDA device; on a processor use bf16 or fp32")
    return name


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
