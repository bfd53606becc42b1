"""Losses that are not numbers are found, with the step at which the first one was."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlflow_dr.errors import TrainingError
from mlflow_dr.training.loss_check import LossCheck


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_the_first_broken_loss_is_named(broken: float) -> None:
    check = LossCheck(most=100)
    for step, loss in enumerate((1.0, 2.0, broken, 3.0, float("nan")), start=1):
        check.note(torch.tensor(loss), step, [f"q{step}", f"other{step}"])
    expected = rf"loss of step 3 is {broken} \(queries 'q3', 'other3'"
    with pytest.raises(TrainingError, match=expected):
        check.check()
    check.check()  # nothing is left


def test_a_processor_reads_each_loss_at_once() -> None:
    check = LossCheck()
    check.note(torch.tensor(1.0), 1, ["q"])
    with pytest.raises(TrainingError, match="loss of step 2 is nan"):
        check.note(torch.tensor(float("nan")), 2, ["q"])


def test_losses_that_nothing_asks_for_are_checked_in_the_end() -> None:
    check = LossCheck(most=3)
    check.note(torch.tensor(float("nan")), 1, ["q"])
    check.note(torch.tensor(1.0), 2, ["q"])
    with pytest.raises(TrainingError, match="loss of step 1 is nan"):
        check.note(torch.tensor(1.0), 3, ["q"])


def test_noting_a_loss_asks_nothing_of_the_device() -> None:
    """A question to a GPU would wait for it; fake tensors have no answers."""
    check = LossCheck(most=100)
    with FakeTensorMode():
        for step in range(3):
            check.note(torch.zeros((), requires_grad=True).exp(), step, ["q"])
        with pytest.raises(Exception, match="_local_scalar"):
            check.check()
