"""Names of number formats, checked without importing torch."""

from __future__ import annotations

from mlflow_dr.errors import DeviceError

AUTO = "auto"
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our name of each number format -> PyTorch's."""


def format_name(name: object) -> str:
    """Our name of a number format, or `auto`; PyTorch's names, `torch.float32`, are taken, too.

    Raises:
        DeviceError: no such format.
    """
    text = str(name).removeprefix("torch.")
    ours = {theirs: ours for ours, theirs in TORCH_NAMES.items()}.get(text, text)
    if ours != AUTO and ours not in TORCH_NAMES:
        raise DeviceError(f"dtype {text[:40]!r}: expected {', '.join((AUTO, *TORCH_NAMES))}")
    return ours
