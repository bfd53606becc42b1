"""Weights of a saved encoder put back into one of the same shape."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.saving import restore_encoder, save_encoder
from mlflow_dr.errors import CheckpointError

Make = Callable[..., Encoder]


def shaken(encoder: Encoder, frozen: bool = False) -> Encoder:
    """With other weights, those that are trained alone unless `frozen`."""
    for weight in encoder.parameters():
        if weight.requires_grad or frozen:
            weight.data.add_(torch.randn(weight.shape))
    return encoder


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("projection", [False, True], ids=["bare", "projected"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_weight_is_restored(
    make_tiny: Make, tmp_path: Path, lora: bool, projection: bool, tied: bool
) -> None:
    encoder = make_tiny()
    if projection:
        encoder = with_projection(encoder, None, 6)
    if not tied:
        untie(encoder)
    if lora:
        add_lora(encoder, "base", rank=2, alpha=4, dropout=0.0)
    expected = {name: value.clone() for name, value in shaken(encoder).state_dict().items()}
    save_encoder(tmp_path / "saved", encoder, merged=False)
    shaken(encoder)
    restore_encoder(tmp_path / "saved", encoder)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_weights_stay_the_same_tensors(make_tiny: Make, tmp_path: Path) -> None:
    """The optimizer holds on to them."""
    encoder = make_tiny()
    save_encoder(tmp_path / "saved", encoder, merged=False)
    before = {name: weight.data_ptr() for name, weight in encoder.named_parameters()}
    restore_encoder(tmp_path / "saved", encoder)
    assert {name: weight.data_ptr() for name, weight in encoder.named_parameters()} == before


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_an_encoder_of_another_shape_is_refused(
    make_tiny: Make, tmp_path: Path, lora: bool
) -> None:
    saved, other = make_tiny(), make_tiny()
    if lora:
        add_lora(saved, "base", rank=2, alpha=4, dropout=0.0)
        add_lora(other, "base", rank=3, alpha=4, dropout=0.0)
    else:
        other = with_projection(other, None, 6)
    save_encoder(tmp_path / "saved", saved, merged=False)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        restore_encoder(tmp_path / "saved", other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_directory_is_named(
    make_tiny: Make, tmp_path: Path, lora: bool, damage: str
) -> None:
    encoder = make_tiny()
    if lora:
        add_lora(encoder, "base", rank=2, alpha=4, dropout=0.0)
    save_encoder(tmp_path / "saved", encoder, merged=False)
    (weights,) = (tmp_path / "saved").glob("*model.safetensors")
    data = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        restore_encoder(tmp_path / "saved", encoder)


def test_a_damaged_projection_beside_adapters_is_named(make_tiny: Make, tmp_path: Path) -> None:
    encoder = with_projection(make_tiny(), None, 6)
    add_lora(encoder, "base", rank=2, alpha=4, dropout=0.0)
    save_encoder(tmp_path / "saved", encoder, merged=False)
    (tmp_path / "saved" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2_Dense"):
        restore_encoder(tmp_path / "saved", encoder)
