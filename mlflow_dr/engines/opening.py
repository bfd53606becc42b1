"""Opening an engine by its name."""

from __future__ import annotations

from mlflow_dr.devices import resolve_devices, resolve_dtype
from mlflow_dr.engines.engine import Engine
from mlflow_dr.engines.local import LocalEngine

LOCAL, RAY = "local", "ray"


class Engines:
    """The engine that is in use; its workers stay warm until another one is asked for."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._engine: Engine | None = None

    def get(self, name: str, device: str) -> Engine:
        """The engine of a name and a device, opened if it is not the one in use.

        Raises:
            MlflowDrError: see `open_engine`.
        """
        if self._engine is None or self._key != (name, device):
            self.close()
            engine = open_engine(name, device)
            if isinstance(engine, LocalEngine):
                return engine  # it has no workers, and would keep its encoder in memory
            self._engine, self._key = engine, (name, device)
        return self._engine

    def close(self) -> None:
        """End the workers of the engine in use."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def device_names(name: str, device: str) -> str:
    """The devices of an engine, without `auto`; Ray finds out by itself.

    Raises:
        DeviceError: no such device.
    """
    return device if name == RAY else ",".join(map(str, resolve_devices(device)))


def open_engine(name: str = LOCAL, device: str = "auto") -> Engine:
    """An engine, to be closed; workers start when they are needed.

    Args:
        name: `local` for this machine, or `ray` for a Ray cluster.
        device: see `resolve_devices`; each of several gets a process of its own.

    Raises:
        DeviceError: no such device.
        UnavailableError: there is no Ray cluster.
        MissingExtraError: Ray is not installed.
    """
    if name == RAY:
        from mlflow_dr.engines.ray import RayEngine

        return RayEngine(device)
    devices = resolve_devices(device)
    if len(devices) == 1:
        return LocalEngine(devices[0])
    from mlflow_dr.engines.processes import ProcessEngine

    return ProcessEngine(devices)


def check_devices_and_dtype(name: str, device: str, dtype: str) -> None:
    """Refuse devices or a number format that this machine does not have, before work is begun.

    Raises:
        DeviceError: with what there is. With Ray, this is known when the engine is opened.
    """
    if name != RAY:
        resolve_dtype(dtype, resolve_devices(device)[0])
