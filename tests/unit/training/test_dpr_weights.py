"""A checkpoint file of DPR's to begin with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_dr.encoder import dpr_checkpoint
from mlflow_dr.encoder.dpr_checkpoint import read_dpr_checkpoint
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.errors import CheckpointError, UsageError


def load_dpr_weights(file: str, encoder: Encoder) -> None:
    dpr_checkpoint.load_dpr_weights(read_dpr_checkpoint(Path(file)), encoder)


@pytest.fixture
def make(make_small: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """A function from a seed to two encoders with different weights."""

    def make(seed: int = 0, size: int | None = None) -> Encoder:
        encoder = make_small(seed=seed, pooling="cls")
        encoder = with_projection(encoder, None, size) if size else encoder
        untie(encoder)
        if seed:
            with torch.no_grad():
                for weight in encoder.query_encoder.parameters():
                    weight.add_(1.0)
        return encoder.eval()

    return make


def dpr_file(path: Path, encoder: Encoder, **more: Any) -> str:
    """What DPR saves of two BERTs: an unused pooler, positions, and a projection where it has."""
    state: dict[str, torch.Tensor] = {}
    for prefix, side in (("question_model.", encoder.query_encoder), ("ctx_model.", encoder)):
        part = dict(side.backbone.state_dict())
        part["pooler.dense.weight"] = torch.zeros(16, 16)
        part["embeddings.position_ids"] = torch.arange(128)
        for module in side.head:
            for name, value in module.state_dict().items():
                part[f"encode_proj.{name.removeprefix('linear.')}"] = value
        state |= {prefix + name: value for name, value in part.items()}
    has_projection = any(type(module).__name__ == "Dense" for module in encoder.head)
    params = {"do_lower_case": True, "projection_dim": int(has_projection)}
    torch.save({"model_dict": state, "epoch": 3, "encoder_params": params, **more}, path)
    return str(path)


@pytest.mark.parametrize("size", [None, 8])
def test_both_encoders_get_the_weights_of_the_file(
    make: Callable[..., Encoder], tmp_path: Path, size: int | None
) -> None:
    theirs, ours = make(seed=1, size=size), make(seed=0, size=size)
    load_dpr_weights(dpr_file(tmp_path / "dpr_biencoder.3", theirs), ours)
    ids = torch.tensor([[2, 9, 8, 3]])
    for our_encoder, their_encoder in zip(
        ours.distinct_encoders, theirs.distinct_encoders, strict=True
    ):
        assert torch.equal(
            our_encoder(ids, torch.ones_like(ids)), their_encoder(ids, torch.ones_like(ids))
        )
    assert not torch.equal(*(side(ids, torch.ones_like(ids)) for side in ours.distinct_encoders))


def test_a_file_of_another_shape_is_refused(
    make: Callable[..., Encoder], make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    file = dpr_file(tmp_path / "dpr_biencoder.3", make(seed=1, size=8))
    with pytest.raises(UsageError, match="needs --projection_dim 8"):
        load_dpr_weights(file, make())
    file = dpr_file(tmp_path / "dpr_biencoder.4", make(seed=1))
    with pytest.raises(UsageError, match="needs --projection_dim 0"):
        load_dpr_weights(file, make(size=8))
    large = make_tiny()
    with pytest.raises(UsageError, match="add --untie_encoder"):
        load_dpr_weights(file, large)
    untie(large)
    with pytest.raises(
        UsageError, match=r"do not have the model's shapes; .* --pretrained_model_cfg"
    ):
        load_dpr_weights(file, large)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"PK\x03\x04 cut",
        {"model_dict": {}},
        {"model_dict": {"question_model.x": 3}},
        {"weights": {}},
        [1, 2],
        {"model_dict": {"ctx_model.x": torch.zeros(1)}},
    ],
)
def test_files_of_another_kind_are_refused(
    make: Callable[..., Encoder], tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "dpr_biencoder.0"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        load_dpr_weights(str(path), make())
    assert "\n" not in str(caught.value)


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("trapped"),))


def test_code_in_a_file_is_not_run(
    make: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = dpr_file(tmp_path / "dpr_biencoder.3", make(seed=1), encoder_params=Trap())
    with pytest.raises(CheckpointError, match="whose code would run; if you trust it, save"):
        load_dpr_weights(file, make())
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(UsageError, match="no such file"):
        load_dpr_weights(str(tmp_path / "none"), make())
