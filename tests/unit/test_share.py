"""How a trainer and a validator share one machine."""

import os

import pytest
import torch

from mlflow_dr.errors import DeviceError
from mlflow_dr.launch import share_machine, visible_gpus


@pytest.mark.parametrize(
    ("cores", "trainer", "validator"),
    [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 6, 2), (64, 48, 16)],
)
def test_without_a_gpu_the_validator_gets_a_quarter_of_the_cores(
    cores: int, trainer: int, validator: int
) -> None:
    for_trainer, for_validator, device = share_machine(gpus=[], cores=cores)
    assert for_trainer == {"OMP_NUM_THREADS": str(trainer)}
    assert for_validator == {"OMP_NUM_THREADS": str(validator), "CUDA_VISIBLE_DEVICES": ""}
    assert device == "cpu"


@pytest.mark.parametrize(("cores", "trainer", "validator"), [(1, 1, 1), (4, 2, 2), (16, 2, 14)])
def test_a_trainer_with_the_only_gpu_leaves_all_cores_but_two(
    cores: int, trainer: int, validator: int
) -> None:
    for_trainer, for_validator, device = share_machine(gpus=["0"], cores=cores)
    assert for_trainer == {"OMP_NUM_THREADS": str(trainer)}
    assert for_validator == {"OMP_NUM_THREADS": str(validator), "CUDA_VISIBLE_DEVICES": ""}
    assert device == "cpu"


@pytest.mark.parametrize("gpus", [["0", "1"], ["4", "7", "2"], ["GPU-a", "GPU-b"]])
def test_with_several_gpus_the_trainer_gets_the_first_and_the_validator_the_last(
    gpus: list[str],
) -> None:
    for_trainer, for_validator, device = share_machine(gpus=gpus, cores=8)
    assert for_trainer == {"CUDA_VISIBLE_DEVICES": gpus[0]}
    assert for_validator == {"CUDA_VISIBLE_DEVICES": gpus[-1]}
    assert device == "cuda:0"


def test_each_training_process_gets_a_gpu_and_the_validator_the_last() -> None:
    gpus = ["0", "1", "2", "3"]
    for_trainer, for_validator, device = share_machine(gpus=gpus, cores=8, trainers=3)
    assert for_trainer == {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert for_validator == {"CUDA_VISIBLE_DEVICES": "3"}
    for_trainer, for_validator, device = share_machine(gpus=gpus, cores=16, trainers=4)
    assert for_trainer == {"OMP_NUM_THREADS": "2"}
    assert for_validator == {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": ""}
    assert device == "cpu"


@pytest.mark.parametrize(("gpus", "trainers"), [([], 2), (["0"], 2), (["0", "1"], 3)])
def test_more_training_processes_than_gpus_are_refused(gpus: list[str], trainers: int) -> None:
    with pytest.raises(DeviceError, match=f"--gpus {trainers}, but this machine has {len(gpus)}"):
        share_machine(gpus=gpus, cores=8, trainers=trainers)


def test_only_usable_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert share_machine(gpus=[])[0] == {"OMP_NUM_THREADS": "9"}
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert share_machine(gpus=[])[0] == {"OMP_NUM_THREADS": "6"}


@pytest.mark.parametrize(
    ("chosen", "count", "expected"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("", 0, []),
        ("-1", 0, []),
        ("5", 1, ["5"]),
        ("3,1", 2, ["3", "1"]),
        ("0,9", 1, ["0"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_have_the_names_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == expected
