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
    """Who gets what.

    Attributes:
        trainer: environment variables of the trainer.
        validator: environment variables of the validator.
        validator_device: the validator's device, as its `--device` takes it.
        validator_yields: whether the validator runs at a lower priority.
    """

    trainer: Mapping[str, str]
    validator: Mapping[str, str]
    validator_device: str
    validator_yields: bool


def share_machine(
    gpus: Sequence[str] | None = None, cores: int | None = None, trainers: int = 1
) -> Share:
    """Share out a machine.

    Each training process has a GPU, the first ones, and the validator the last one where one is
    left. Else the validator works on the processor: on a quarter of the cores beside a trainer that
    is there too, and on all but two for each training process that has a GPU.

    Args:
        gpus: names of the GPUs as CUDA_VISIBLE_DEVICES has them; asked of this machine when None.
        cores: number of cores; asked of this machine when None.
        trainers: training processes.

    Raises:
        DeviceError: several training processes, and fewer GPUs.
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
    """The GPUs that CUDA programs started here would see."""
    import torch

    count = torch.cuda.device_count()
    chosen = [name for name in os.environ.get(GPUS, "").split(",") if name]
    return chosen[:count] if chosen else [str(index) for index in range(count)]
