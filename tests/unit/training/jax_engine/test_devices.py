"""Compiling in a thread, and devices that cannot be used."""

import signal
import time
from types import FrameType

import jax
import pytest

from mlflow_dr.errors import DeviceError
from mlflow_dr.jax_engine import devices
from mlflow_dr.jax_engine.memory import asked_for


class Slow:
    """What takes two seconds to compile."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def compile(self) -> str:
        if self._error:
            raise self._error
        time.sleep(2)
        return "compiled"


def test_a_signal_is_answered_while_a_step_compiles() -> None:
    """The second request to stop raises in the handler."""

    def ask(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ask)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            devices.compiled(Slow(), "a step")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 1.9


def test_an_error_of_the_compiler_is_raised() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.68G of 15.75G hbm.")
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        devices.compiled(Slow(error), "a step")
    assert devices.is_out_of_memory(raised.value)
    assert asked_for(raised.value) == "20.68G"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("The TPU is already in use by process with pid 7.", "another process holds the TPU"),
        ("Unable to initialize backend 'tpu'", "set JAX_PLATFORMS=cpu"),
    ],
)
def test_devices_that_cannot_be_used_are_one_line(
    monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    def fails() -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(devices.jax, "devices", fails)
    with pytest.raises(DeviceError, match=message):
        devices.find_devices()
