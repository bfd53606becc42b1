"""Checkpoints of DPR: settings of both generations, vectors that stay, and titles as pairs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.dpr_checkpoint import (
    export_dpr,
    import_dpr,
    import_dpr_encoders,
    read_dpr_checkpoint,
)
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import CheckpointError, UsageError

IDS = torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0]])
DPR = {"pooling": "cls", "title_separator": " [SEP] "}


@pytest.fixture
def make_dpr(make_tiny: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """Makes two encoders with a projection, whose weights differ; settings as `make_tiny`."""

    def make(**settings: Any) -> Encoder:
        encoder = with_projection(make_tiny(**{**DPR, **settings}), None, 24)
        untie(encoder)
        with torch.no_grad():
            for weight in encoder.query_encoder.parameters():
                weight.mul_(1.5)
        return encoder.eval()

    return make


def vectors(encoder: Encoder) -> list[torch.Tensor]:
    mask = (IDS > 0).long()
    with torch.no_grad():
        return [side.eval()(IDS, mask) for side in encoder.distinct_encoders]


def test_vectors_survive_export_and_import(
    make_dpr: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = make_dpr()
    save_encoder(tmp_path / "ours", encoder)
    export_dpr(encoder, tmp_path / "dpr_biencoder.0", str(tmp_path / "ours"))
    found = import_dpr(tmp_path / "dpr_biencoder.0")
    for ours, theirs in zip(vectors(encoder), vectors(found), strict=True):
        assert torch.equal(ours, theirs)
    assert found.settings.title_as_pair
    save_encoder(tmp_path / "again", found)
    again = load_encoder(tmp_path / "again")
    assert again.settings == found.settings
    assert again.query_encoder.settings.query_max_length == found.settings.query_max_length
    assert import_dpr(tmp_path / "dpr_biencoder.0", length=40).settings.passage_max_length == 40


@pytest.mark.parametrize("size", [0, 24])
def test_vectors_are_those_of_transformers(
    make_tiny: Callable[..., Encoder], tmp_path: Path, size: int
) -> None:
    kinds = (transformers.DPRQuestionEncoder, transformers.DPRContextEncoder)
    tokenizer = make_tiny().tokenizer
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.DPRConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, projection_dim=size, **shape
    )
    expected = []
    for kind in kinds:
        model = kind(config).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        tokenizer.save_pretrained(tmp_path / kind.__name__)
        with torch.no_grad():
            expected.append(model(IDS, (IDS > 0).long()).pooler_output)
    paths = [str(tmp_path / kind.__name__) for kind in kinds]
    found = import_dpr_encoders(*paths)
    save_encoder(tmp_path / "ours", found)
    for encoder in (found, load_encoder(tmp_path / "ours")):
        passages, queries = vectors(encoder)
        assert torch.allclose(queries, expected[0], atol=1e-5)
        assert torch.allclose(passages, expected[1], atol=1e-5)
    with pytest.raises(UsageError, match=r"expected question_encoder\.\*"):
        import_dpr_encoders(*paths[::-1])


def hydra_settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Objects as OmegaConf pickles them: a dictionary of nodes, and their metadata."""
    classes: dict[str, Any] = {}
    for name in ("dictconfig.DictConfig", "nodes.AnyNode", "base.ContainerMetadata"):
        module_name, _, kind = f"omegaconf.{name}".rpartition(".")
        module = ModuleType(module_name)
        classes[kind] = type(kind, (), {"__module__": module_name})
        setattr(module, kind, classes[kind])
        monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))

    def made(kind: str, **state: Any) -> Any:
        value = classes[kind]()
        value.__dict__.update(state)
        return value

    metadata = made("ContainerMetadata", element_type=dict, key_type=Any)
    content = {"sequence_length": made("AnyNode", _val=64), "pretrained_model_cfg": "my-bert"}
    return made("DictConfig", _metadata=metadata, _parent=None, _content=content)


def test_settings_of_hydra_are_read_without_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dpr_biencoder.0"
    params = {"do_lower_case": True, "encoder": hydra_settings(monkeypatch)}
    torch.save({"model_dict": {"ctx_model.x": torch.zeros(1)}, "encoder_params": params}, path)
    monkeypatch.undo()
    settings = read_dpr_checkpoint(path).settings
    assert (settings["sequence_length"], settings["do_lower_case"]) == (64, True)
    with pytest.raises(UsageError, match="my-bert"):
        import_dpr(path)
    torch.save({"model_dict": {"ctx_model.x": torch.zeros(1)}}, path)
    with pytest.raises(UsageError, match=r"does not name the model .* give --backbone"):
        import_dpr(path)


def test_a_reader_and_another_backbone_are_refused(
    make_dpr: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = make_dpr()
    save_encoder(tmp_path / "ours", encoder)
    path = tmp_path / "dpr_reader.0"
    torch.save({"model_dict": {"encoder.x": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=r"has no ctx_model\.\*; expected a bi-encoder"):
        import_dpr(path, str(tmp_path / "ours"))
    state = {"question_model.x": torch.zeros(1), "ctx_model.x": torch.zeros(1)}
    torch.save({"model_dict": state}, path)
    with pytest.raises(UsageError, match=r"trained from by --backbone"):
        import_dpr(path, str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, "its pooling is mean"),
        ({"normalize": True}, "its vectors are normalised"),
        ({"query_prompt": "q: "}, "it has prompts"),
        ({"title_separator": " "}, "titles are separated by ' '"),
    ],
)
def test_what_dpr_cannot_express_is_refused(
    make_dpr: Callable[..., Encoder], tmp_path: Path, settings: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=f"cannot use this encoder: {message}"):
        export_dpr(make_dpr(**settings), tmp_path / "x", "bert")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("length", [8, 9, 20])
def test_the_longer_of_title_and_text_is_cut(
    make_tiny: Callable[..., Encoder], texts: list[str], length: int
) -> None:
    encoder = make_tiny(**DPR, passage_max_length=length, title_as_pair=True)
    tokenizer = TextTokenizer.of(encoder)
    cls, sep = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    the = encoder.tokenizer("the " * 9, add_special_tokens=False)["input_ids"][:1]
    cases = [("the " * t, "the " * n) for t in (0, 1, 3, 5, 9) for n in (0, 1, 4, 5, 9)]
    found = tokenizer.passage_ids([Passage("", title.strip(), text) for title, text in cases])
    for (title, text), ids in zip(cases, found, strict=True):
        pair = [len(title.split()), len(text.split())]
        # DPR's tokenizer drops one token at a time
        room = length - (3 if pair[0] else 2)
        while sum(pair) > room:
            pair[0 if pair[0] > pair[1] else 1] -= 1
        middle = [*the * pair[0], sep] if pair[0] else []
        assert ids == [cls, *middle, *the * pair[1], sep]


def test_the_digest_of_titles_in_one_text_stays(make_tiny: Callable[..., Encoder]) -> None:
    one, pair = (make_tiny(**DPR, title_as_pair=as_pair) for as_pair in (False, True))
    digests = {TextTokenizer.of(encoder).passage_digest() for encoder in (one, pair)}
    assert len(digests) == 2
