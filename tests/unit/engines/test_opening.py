"""Engines by name."""

import pytest

from mlflow_dr.engines.local import LocalEngine
from mlflow_dr.engines.opening import Engines, check_devices_and_dtype, device_names, open_engine
from mlflow_dr.engines.processes import ProcessEngine
from mlflow_dr.errors import DeviceError, MissingExtraError, UsageError


def test_one_device_is_this_process_and_several_are_processes() -> None:
    assert isinstance(open_engine("local", "cpu"), LocalEngine)
    engine = open_engine("local", "cpu,cpu,cpu")
    assert isinstance(engine, ProcessEngine)
    assert engine.n_shards == 24
    assert engine._members == []  # they start when they are needed
    engine.close()


def test_the_engine_in_use_stays_until_another_one_is_asked_for() -> None:
    engines = Engines()
    first = engines.get("local", "cpu,cpu")
    assert engines.get("local", "cpu,cpu") is first
    local = engines.get("local", "cpu")
    assert isinstance(local, LocalEngine)
    assert engines.get("local", "cpu") is not local  # it would keep an encoder in memory
    assert engines.get("local", "cpu,cpu") is not first
    engines.close()
    engines.close()


def test_devices_have_one_name_each() -> None:
    assert device_names("local", "cpu,cpu") == "cpu,cpu"
    assert device_names("ray", "auto") == "auto"


def test_what_this_machine_does_not_have_is_refused_early() -> None:
    with pytest.raises(DeviceError, match="fp16 needs a CUDA device"):
        check_devices_and_dtype("local", "cpu,cpu", "fp16")
    with pytest.raises(DeviceError, match="does not exist"):
        check_devices_and_dtype("local", "cpu,cuda:99", "fp32")
    check_devices_and_dtype("ray", "cuda", "fp16")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"mlflow_dr\[ray\]"):
        open_engine("ray")


def test_ray_chooses_the_devices_itself() -> None:
    with pytest.raises(UsageError, match="'cuda:1': with --engine ray it is auto, cpu or cuda"):
        open_engine("ray", "cuda:1")
