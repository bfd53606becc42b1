"""Linear layers computed by oneDNN give what PyTorch's give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    TrainingArguments,
)

from mlflow_dr import compat
from mlflow_dr.encoder import onednn
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.onednn import OneDnnLayers, trained_by_onednn
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.encode import encode_batches
from mlflow_dr.stores.token_table import TokenTable, token_table
from mlflow_dr.training.encoder_setup import set_dropout

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 100,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
}


class Tokenizer:
    pad_token_id = 0


def bert(**settings: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, **settings), add_pooling_layer=False).eval()


def encoder_of(backbone: nn.Module) -> Encoder:
    return Encoder(backbone, Tokenizer(), EncoderConfig(pooling="mean", normalize=True)).eval()


@pytest.fixture(scope="module")
def table() -> TokenTable:
    generator = np.random.default_rng(0)
    return token_table([generator.integers(5, 100, length).tolist() for length in (30, 30, 9, 1)])


@pytest.fixture(autouse=True)
def no_warning_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(encode, "_warnings", set())
    yield


def calls_of_gelu(model: nn.Module) -> int:
    events = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with events, torch.inference_mode():
        model(torch.arange(20)[None])
    return sum(event.count for event in events.key_averages() if event.key == "aten::gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@torch.inference_mode()
def test_states_are_the_same(dtype: torch.dtype, activation: str) -> None:
    model = bert(hidden_act=activation).to(dtype)
    ids = torch.arange(60).reshape(3, 20)
    expected = model(ids).last_hidden_state
    layers = OneDnnLayers(model, 60)
    with layers.used():
        found = model(ids).last_hidden_state
    exact = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=exact)
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0, atol=0)


def test_layers_have_their_own_methods_again_after_an_error() -> None:
    model = bert()
    with pytest.raises(ValueError, match="stop"), OneDnnLayers(model, 60).used():
        raise ValueError("stop")
    assert not any("forward" in vars(module) for module in model.modules())


def test_gelu_is_computed_with_the_layer_before_it() -> None:
    model = bert()
    assert calls_of_gelu(model) == 2
    with OneDnnLayers(model, 20).used():
        assert calls_of_gelu(model) == 0


def test_subclasses_of_linear_layers_are_left_alone() -> None:
    class Halved(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    model = nn.Sequential(Halved(8, 8), nn.Linear(8, 4, bias=False))
    inputs = torch.randn(3, 8)
    with torch.inference_mode():
        expected = model(inputs)
        with OneDnnLayers(model, 3).used():
            assert [("forward" in vars(module)) for module in model] == [False, True]
            torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("is_faster", [True, False])
def test_vectors_are_the_same(
    kind: str, is_faster: bool, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    backbone = bert() if kind == "bert" else DistilBertModel(DistilBertConfig(**DISTIL)).eval()
    encoder, rows = encoder_of(backbone), np.arange(len(table))
    monkeypatch.setattr(encode, "is_onednn_faster", lambda device: not is_faster)
    ((_, expected),) = encode_batches(encoder, table, 0, [rows])
    monkeypatch.setattr(encode, "is_onednn_faster", lambda device: is_faster)
    made: list[OneDnnLayers] = []
    monkeypatch.setattr(
        encode, "OneDnnLayers", lambda *args: made.append(OneDnnLayers(*args)) or made[0]
    )
    ((_, found),) = encode_batches(encoder, table, 0, [rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(made) == is_faster


def test_a_backbone_with_other_vectors_is_encoded_without_and_it_is_said(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(BertModel):
        """Its weights differ in each pass, as those of layers that are made anew do."""

        def forward(self, *args: Any, **options: Any) -> Any:
            layer = self.encoder.layer[0].intermediate.dense
            weight = nn.Parameter(layer.weight * -1, requires_grad=False)
            kept, layer.weight = layer.weight, weight
            try:
                return super().forward(*args, **options)
            finally:
                layer.weight = kept

    torch.manual_seed(0)
    backbone = Odd(BertConfig(**SIZES, initializer_range=0.5), add_pooling_layer=False).eval()
    encoder = encoder_of(backbone)
    monkeypatch.setattr(encode, "is_onednn_faster", lambda device: False)
    ((_, expected),) = encode_batches(encoder, table, 0, [np.arange(4)])
    monkeypatch.setattr(encode, "is_onednn_faster", lambda device: True)
    for _ in range(2):
        ((_, found),) = encode_batches(encoder, table, 0, [np.arange(4)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("Odd is encoded without oneDNN, which is slower (vectors differ")


def gradients(model: BertModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids).last_hidden_state.square().mean().backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def arguments(folder: Path, **flags: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **flags)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_gradients_are_the_same(
    recomputes: bool, frozen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = bert().train(), torch.arange(60).reshape(3, 20)
    set_dropout(model, 0.0)
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or not name.endswith(frozen))
    expected = gradients(model, ids)
    products: list[int] = []
    product = compat.onednn_product
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda device: True)
    monkeypatch.setattr(
        compat, "onednn_product", lambda *args: (products.append(1), product(*args))[1]
    )
    with trained_by_onednn(model, arguments(tmp_path)):
        found = gradients(model, ids)
    assert products
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("case", ["slower", "compiled", "autocast", "fp64"])
def test_other_trainings_are_as_always(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda device: case != "slower")
    monkeypatch.setattr(compat, "onednn_product", lambda *args: pytest.fail("oneDNN was used"))
    model = bert().train()
    model = model.double() if case == "fp64" else model
    flags = {"torch_compile": True} if case == "compiled" else {}
    with (
        trained_by_onednn(model, arguments(tmp_path, **flags)),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        gradients(model, torch.arange(20)[None])


def test_a_layer_without_bias_and_one_row_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda device: True)
    layer = nn.Linear(4, 3, bias=False)
    inputs = torch.randn(1, 4, requires_grad=True)
    with trained_by_onednn(nn.Sequential(layer), arguments(tmp_path)):
        layer(inputs).sum().backward()
    assert inputs.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(inputs.grad, layer.weight.sum(dim=0)[None])
    torch.testing.assert_close(layer.weight.grad, inputs.detach().expand(3, 4))
