"""Devices and number formats by name, and copies."""

import numpy as np
import pytest
import torch

from mlflow_dr import devices
from mlflow_dr.devices import (
    begin_host_copy,
    on_device,
    resolve_device,
    resolve_devices,
    resolve_dtype,
    torch_dtype,
)
from mlflow_dr.errors import DeviceError

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    count, capability = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))


none = pytest.mark.parametrize("gpus", [(0, 0)], indirect=True)
two_new = pytest.mark.parametrize("gpus", [(2, 8)], indirect=True)
two_old = pytest.mark.parametrize("gpus", [(2, 7)], indirect=True)


@none
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu(gpus: None, name: str) -> None:
    assert resolve_device(name) == CPU


@two_new
@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_with_two_gpus(gpus: None, name: str, expected: str) -> None:
    assert resolve_device(name) == torch.device(expected)


@none
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_missing_gpu_is_an_error(gpus: None, name: str) -> None:
    with pytest.raises(DeviceError, match=f"{name!r} does not exist: .* has no CUDA device"):
        resolve_device(name)


@two_new
def test_a_gpu_index_that_does_not_exist(gpus: None) -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2' does not exist: .* has CUDA devices 0 to 1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:-1", "cuda:x", "mps", "meta"])
def test_unknown_device_names(name: str) -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda or cuda:<n>"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("vendor", "avx512", "amx", "expected"),
    [
        ("AuthenticAMD", False, False, "fp32"),
        ("AuthenticAMD", True, False, "bf16"),
        ("GenuineIntel", True, False, "fp32"),
        ("GenuineIntel", True, True, "bf16"),
        ("", False, True, "bf16"),
    ],
)
def test_bf16_on_processors_that_multiply_it_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str, avx512: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(devices, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("vendor", "avx512", "device", "expected"),
    [
        ("AuthenticAMD", True, "cpu", True),
        ("AuthenticAMD", False, "cpu", False),
        ("GenuineIntel", True, "cpu", False),
        ("", True, "cpu", False),
        ("AuthenticAMD", True, "cuda", False),
    ],
)
def test_processors_on_which_onednn_is_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str, avx512: bool, device: str, expected: bool
) -> None:
    monkeypatch.setattr(devices, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    assert devices.is_onednn_faster(torch.device(device)) is expected


@two_new
def test_several_devices_of_one_type(gpus: None) -> None:
    assert [str(device) for device in resolve_devices("cuda:1,cuda:0")] == ["cuda:1", "cuda:0"]
    assert [str(device) for device in resolve_devices("cpu,cpu")] == ["cpu", "cpu"]
    assert len(resolve_devices("auto")) == 1


@two_new
def test_devices_of_two_types_are_refused(gpus: None) -> None:
    with pytest.raises(DeviceError, match="two types"):
        resolve_devices("cpu,cuda:0")


@two_new
def test_bf16_on_new_gpus(gpus: None) -> None:
    assert resolve_dtype("auto", torch.device("cuda:0")) == "bf16"


@two_old
def test_fp32_on_old_gpus(gpus: None) -> None:
    assert resolve_dtype("auto", torch.device("cuda:0")) == "fp32"


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_number_format_by_name(name: str) -> None:
    assert resolve_dtype(name, CPU) == name
    assert torch_dtype(name) == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_number_format_by_its_pytorch_name(name: str | torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == "bf16"
    assert resolve_dtype("float32", CPU) == "fp32"
    assert resolve_dtype("float16", torch.device("cuda:0")) == "fp16"


def test_fp16_needs_a_gpu() -> None:
    assert resolve_dtype("fp16", torch.device("cuda:0")) == "fp16"
    with pytest.raises(DeviceError, match="fp16 needs a CUDA device"):
        resolve_dtype("fp16", CPU)


@pytest.mark.parametrize("name", ["float64", "float8", "FP32", "", "int8"])
def test_unknown_number_formats(name: str) -> None:
    with pytest.raises(DeviceError, match="expected auto, fp32, bf16, fp16"):
        resolve_dtype(name, CPU)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_to_a_device_and_back(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    array = np.arange(100_000)
    copied = on_device(array, torch.device(name))
    assert copied.device.type == name
    doubled = copied * 2
    found = begin_host_copy(doubled)()
    assert (found is doubled) == (name == "cpu")
    np.testing.assert_array_equal(found.numpy(), 2 * array)
