"""Adapters: what is trained, what is saved, and what is loaded again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
)

from mlflow_dr.encoder import lora
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, is_adapted, untie, with_projection
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, MissingExtraError, UsageError

Make = Callable[..., Encoder]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 6, 3, 0, 0]])
MASK = (IDS != 0).long()
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def base_name(directory: Path) -> str:
    """The backbone that the description of adapters names."""
    description = json.loads((directory / "adapter_config.json").read_text())
    return str(description["base_model_name_or_path"])


def backbone(kind: str, vocabulary: int) -> Any:
    if kind == "bert":
        config = BertConfig(vocab_size=vocabulary, intermediate_size=32, **SIZE)
        return BertModel(config, add_pooling_layer=False)
    if kind == "gpt2":  # its layers are transposed
        return GPT2Model(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2))
    if kind == "opt":
        return OPTModel(
            OPTConfig(vocab_size=vocabulary, ffn_dim=32, word_embed_proj_dim=16, **SIZE)
        )
    return Qwen2Model(
        Qwen2Config(vocab_size=vocabulary, intermediate_size=32, num_key_value_heads=1, **SIZE)
    )


@pytest.fixture
def make(make_tiny: Make) -> Make:
    """A function from a kind of backbone to a small encoder of it in evaluation mode."""

    def make(kind: str = "bert") -> Encoder:
        tokenizer = make_tiny().tokenizer
        torch.manual_seed(0)
        settings = EncoderConfig("mean", normalize=True)
        return Encoder(backbone(kind, len(tokenizer) + 8), tokenizer, settings).eval()

    return make


def adapted(encoder: Encoder, base: str = "base", **options: Any) -> Encoder:
    """With adapters that are as if trained; fresh ones change nothing."""
    torch.manual_seed(1)
    add_lora(encoder, base, **{"rank": 4, "alpha": 8, "dropout": 0.1, **options})
    for name, weight in encoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return encoder.eval()


def moved(encoder: Encoder) -> set[str]:
    return {name for name, weight in encoder.named_parameters() if weight.requires_grad}


KINDS = ("bert", "gpt2", "qwen2")


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_at_first_they_change_nothing(make: Make, kind: str) -> None:
    encoder = make(kind)
    before = encoder(IDS, MASK)
    add_lora(encoder, "base", rank=4, alpha=8, dropout=0.1)
    assert torch.equal(encoder.eval()(IDS, MASK), before)
    assert all(".lora_A." in name or ".lora_B." in name for name in moved(encoder))
    assert len(moved(encoder)) > 4
    assert is_adapted(encoder.backbone)
    assert not is_adapted(make(kind).backbone)


def test_adapters_are_on_the_usual_layers_or_on_all_linear_ones(make: Make) -> None:
    def layers(kind: str, **options: Any) -> set[str]:
        names = moved(adapted(make(kind), **options))
        return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}

    assert layers("qwen2") == set(lora.USUAL_TARGETS)
    assert layers("opt") == {"q_proj", "k_proj", "v_proj"}
    assert layers("bert") == {"query", "key", "value", "dense"}
    assert layers("bert", targets=["query", "value"]) == {"query", "value"}


def test_rank_and_scale(make: Make) -> None:
    small = adapted(make(), rank=2, alpha=8)
    weights = {name: weight for name, weight in small.named_parameters() if ".lora_A." in name}
    assert {len(weight) for weight in weights.values()} == {2}
    layer = next(module for module in small.modules() if hasattr(module, "lora_A"))
    assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_adapters_give_a_plain_encoder_with_the_same_vectors(
    make: Make, kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = with_projection(make(kind), None, 6)
    before = encoder(IDS, MASK)
    if not tied:
        untie(encoder)
    adapted(encoder)
    vectors = [part(IDS, MASK) for part in (encoder, encoder.query_encoder)]
    save_encoder(tmp_path / "saved", encoder)
    monkeypatch.setitem(sys.modules, "peft", None)  # it is not needed any more
    loaded = load_encoder(tmp_path / "saved", safetensors_only=True)
    for part, expected in zip((loaded, loaded.query_encoder), vectors, strict=True):
        torch.testing.assert_close(part(IDS, MASK), expected, rtol=1e-5, atol=1e-5)
        assert (expected - before).abs().max() > 1e-2
    assert not list(tmp_path.rglob("adapter*"))
    assert tied == (loaded.untied_query_encoder is None)
    assert type(loaded.backbone).__name__ == type(backbone(kind, 10)).__name__


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"use_dora": True}, "Dora|magnitude"),
        ({"lora_bias": True}, r"lora_B\.default\.bias"),
        ({"modules_to_save": ["word_embeddings"]}, "word_embeddings"),
        ({"target_modules": ["query", "word_embeddings"]}, "lora_embedding_A"),
    ],
    ids=["dora", "bias", "modules", "embeddings"],
)
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # peft 0.21, of biases that it trains
def test_adapters_that_are_not_only_products_are_not_merged(
    make: Make, tmp_path: Path, more: dict[str, Any], what: str
) -> None:
    """They would be published wrong; alone they are published."""
    config = LoraConfig(**{"target_modules": ["query", "dense"], "r": 2, **more})
    torch.manual_seed(1)
    with lora._quiet_peft():
        trained = get_peft_model(make().backbone, config)
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn_like(weight)
    trained.save_pretrained(str(tmp_path / "adapters"), save_embedding_layers=False)
    options: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0}
    with pytest.raises(UsageError, match=what) as caught:
        add_lora(make(), "base", start=tmp_path / "adapters", **options)
    assert "\n" not in str(caught.value)
    base = make()
    save_encoder(tmp_path / "base", base)
    name = str(tmp_path / "base")
    add_lora(base, name, start=tmp_path / "adapters", merged=False, **options)
    save_encoder(tmp_path / "saved", base, merged=False)
    vectors = load_encoder(tmp_path / "saved", safetensors_only=True)(IDS, MASK)
    torch.testing.assert_close(vectors, base.eval()(IDS, MASK), rtol=1e-5, atol=1e-5)
    assert (vectors - make()(IDS, MASK)).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_saved_alone_are_put_on_their_base_again(
    make: Make, tied: bool, tmp_path: Path
) -> None:
    encoder = with_projection(make(), None, 6)
    base = tmp_path / "base"
    save_encoder(base, encoder)
    if not tied:
        untie(encoder)
    adapted(encoder, str(base))
    vectors = [part(IDS, MASK) for part in (encoder, encoder.query_encoder)]
    save_encoder(tmp_path / "saved", encoder, merged=False)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "mlflow_dr.json"} <= names
    assert not {"model.safetensors", "config.json", "README.md"} & names
    assert base_name(tmp_path / "saved") == str(base)
    loaded = load_encoder(tmp_path / "saved", safetensors_only=True)
    for part, expected in zip((loaded, loaded.query_encoder), vectors, strict=True):
        torch.testing.assert_close(part(IDS, MASK), expected, rtol=1e-5, atol=1e-5)
    weights = (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size
    assert weights < 0.8 * (base / "model.safetensors").stat().st_size


def test_a_snapshot_is_saved_although_training_continues(make: Make, tmp_path: Path) -> None:
    encoder = adapted(make())
    expected = encoder(IDS, MASK)
    snapshot = {name: value.clone() for name, value in encoder.state_dict().items()}
    for weight in encoder.parameters():
        weight.data.add_(1.0)
    save_encoder(tmp_path / "saved", encoder, snapshot)
    loaded = load_encoder(tmp_path / "saved")
    torch.testing.assert_close(loaded(IDS, MASK), expected, rtol=1e-5, atol=1e-5)


def test_training_continues_with_saved_adapters(make: Make, tmp_path: Path) -> None:
    save_encoder(tmp_path / "base", make())
    first = adapted(make(), str(tmp_path / "base"), rank=3)
    save_encoder(tmp_path / "saved", first, merged=False)
    again = load_encoder(tmp_path / "base")
    add_lora(again, "elsewhere", rank=9, alpha=9, dropout=0.9, start=tmp_path / "saved")
    torch.testing.assert_close(again.eval()(IDS, MASK), first(IDS, MASK), rtol=1e-6, atol=1e-6)
    assert moved(again) == moved(first)
    assert {len(p) for n, p in again.named_parameters() if ".lora_A." in n} == {3}
    save_encoder(tmp_path / "more", again, merged=False)
    assert base_name(tmp_path / "more") == "elsewhere"


def test_missing_layers_are_named(make: Make) -> None:
    with pytest.raises(UsageError, match=r"no adapters on base: .*q_proj_of_another") as caught:
        add_lora(make(), "base", rank=4, alpha=8, dropout=0.0, targets=["q_proj_of_another"])
    assert "\n" not in str(caught.value)


def test_a_start_without_adapters_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapters on base") as caught:
        add_lora(make(), "base", rank=4, alpha=8, dropout=0.0, start=tmp_path)
    assert "\n" not in str(caught.value)


def test_adapters_of_another_shape_are_refused(make: Make, tmp_path: Path) -> None:
    save_encoder(tmp_path / "gpt2", make("gpt2"))
    encoder = adapted(make("bert"), str(tmp_path / "gpt2"))
    save_encoder(tmp_path / "saved", encoder, merged=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(tmp_path / "saved")


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "base", make())
    save_encoder(tmp_path / "saved", adapted(make(), str(tmp_path / "base")), merged=False)
    return tmp_path / "saved"


def test_a_missing_base_is_named(saved: Path) -> None:
    (saved.parent / "base").rename(saved.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="adapters of another backbone") as caught:
        load_encoder(saved)
    assert str(saved.parent / "base") in str(caught.value)


def test_pickled_adapters_are_not_read(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only read as safetensors"):
        load_encoder(saved)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", json.dumps({"base_model_name_or_path": None})], ids=str
)
def test_a_damaged_description_is_named(saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_encoder(saved)


def test_truncated_adapters_are_named(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(saved)


def test_without_peft_the_extra_is_named(
    make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for work in (
        lambda: add_lora(make(), "base", rank=4, alpha=8, dropout=0.0),
        lambda: load_encoder(saved),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'mlflow_dr\[lora\]'"):
            work()


def test_adapters_may_be_based_on_adapters(make: Make, saved: Path) -> None:
    """Published adapters are trained further and published as adapters."""
    second = adapted(load_encoder(saved), str(saved))
    save_encoder(saved.parent / "second", second, merged=False)
    loaded = load_encoder(saved.parent / "second")
    torch.testing.assert_close(loaded(IDS, MASK), second(IDS, MASK), rtol=1e-5, atol=1e-5)


def described(make_tiny: Make, folder: Path, **values: object) -> Path:
    """Adapters whose description is changed."""
    encoder = make_tiny(pooling="mean")
    save_encoder(folder / "base", make_tiny(pooling="mean"))
    add_lora(encoder, str(folder / "base"), rank=2, alpha=4, dropout=0.0, merged=False)
    for name, weight in encoder.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    save_encoder(folder / "adapters", encoder, merged=False)
    path = folder / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder / "adapters"


def test_a_regular_expression_for_the_layers_is_not_run(make_tiny: Make, tmp_path: Path) -> None:
    directory = described(make_tiny, tmp_path / "plain")
    expected = load_encoder(directory).state_dict()
    other = described(make_tiny, tmp_path / "other", target_modules="(([a-z._0-9]*)*)*!")
    for name, value in load_encoder(other).state_dict().items():
        assert value.shape == expected[name].shape


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_other_regular_expressions_are_refused(make_tiny: Make, tmp_path: Path, name: str) -> None:
    directory = described(make_tiny, tmp_path, **{name: {"(a+)+$": 4}})
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: {name} has the regular"):
        load_encoder(directory)


def test_adapters_that_are_based_on_themselves(make_tiny: Make, tmp_path: Path) -> None:
    directory = described(make_tiny, tmp_path)
    path = directory / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(directory)}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="leads back to adapters that are based on it"):
        load_encoder(directory)


def test_adapters_without_a_tokenizer_use_their_bases(make_tiny: Make, tmp_path: Path) -> None:
    directory = described(make_tiny, tmp_path)
    expected = load_encoder(directory)
    for path in directory.glob("*token*"):
        path.unlink()
    found = load_encoder(directory)
    assert found.tokenizer("a ship").input_ids == expected.tokenizer("a ship").input_ids


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size"])
def test_a_backbone_of_absurd_size_is_refused(make_tiny: Make, tmp_path: Path, name: str) -> None:
    save_encoder(tmp_path / "huge", make_tiny())
    path = tmp_path / "huge" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 1_000_000_000}))
    with pytest.raises(CheckpointError, match=name):
        load_encoder(tmp_path / "huge")
