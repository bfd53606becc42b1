"""How a trainer and a validator on one machine share its devices and cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow_dr.errors import DeviceError
from mlflow_dr.files import usable_cores

GPUS = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Share:
    """The devices and cores of a trainer and of a validator.

    Attributes:
        trainer: environment variables of the trainer.
        validator: environment variables of the validator.
        validator_device: the validator's `--device`.
        validator_yields: whether the validator runs at a lower priority.
    """

    trainer: Mapping[str, str]
    validator: Mapping[str, str]
    validator_device: str
    validator_yields: bool


def share_machine(
    gpus: Sequence[str] | None = None, cores: int | None = None, trainers: int = 1
) -> Share:
    """Divide a machine between a trainer and a validator.

    Each training process gets one GPU, and the validator gets the last GPU if one is left. If none
    is left, the validator runs on the processor: on a quarter of the cores if the trainer runs
    there, too, and otherwise on all cores but two for each training process.

    Args:
        gpus: names of the GPUs as in CUDA_VISIBLE_DEVICES; this machine's when None.
        cores: number of cores; this machine's when None.
        trainers: number of training processes.

    Raises:
        DeviceError: several training processes have fewer GPUs.
    """
    gpus = visible_gpus() if gpus is None else gpus
    cores = cores or usable_cores()
    if trainers > 1 and trainers > len(gpus):
        raise DeviceError(
            f"--gpus {trainers}, but this machine has {len(gpus)}; start `torchrun -m mlflow_dr "
            "train` yourself to train in several processes on one device"
        )
    if len(gpus) > trainers:
        training = ",".join(gpus[:trainers])
        return Share({GPUS: training}, {GPUS: gpus[-1]}, "cuda:0", False)
    validator = max(1, cores - 2 * trainers) if gpus else max(1, cores // 4)
    trainer = max(1, (cores - validator) // trainers)
    return Share(
        {THREADS: str(trainer)},
        {THREADS: str(validator), GPUS: ""},
        "cpu",
        True,
    )


def visible_gpus() -> list[str]:
    """The GPUs that CUDA programs see on this machine."""
    import torch

    count = torch.cuda.device_count()
    chosen = [name for name in os.environ.get(GPUS, "").split(",") if name]
    return chosen[:count] if chosen else [str(index) for index in range(count)]
