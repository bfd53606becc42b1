"""Whatever is published loads as an encoder with the same vectors."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn

from mlflow_dr.collection.records import Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.training.checkpoint_source import (
    check_directory,
    source_of,
    unwrapped,
)
from mlflow_dr.training.publishing import CheckpointSource, EncoderSource


@pytest.fixture
def theirs(make_tiny: Callable[..., Encoder], tmp_path: Path) -> SentenceTransformer:
    """A SentenceTransformer with every supported part: pooling, projection, prompts, length."""
    encoder = make_tiny(
        pooling="mean",
        normalize=True,
        projections=(Dense(128, 32, activation_function=nn.Tanh()),),
        query_prompt="ask: ",
        passage_prompt="say: ",
        query_max_length=24,
        passage_max_length=24,
    )
    save_encoder(tmp_path / "theirs", encoder)
    return SentenceTransformer(str(tmp_path / "theirs"), device="cpu")


@pytest.fixture
def tiny(make_tiny: Callable[..., Encoder]) -> Encoder:
    """An encoder that cuts no text, as a bare backbone does not."""
    lengths = {"query_max_length": 512, "passage_max_length": 512}
    return make_tiny(pooling="mean", normalize=True, **lengths)


def vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    ids = TextTokenizer.of(encoder).query_ids(
        [Query(str(number), text) for number, text in enumerate(texts)]
    )
    rows = []
    with torch.inference_mode():
        for tokens in ids:
            batch = torch.tensor([tokens])
            rows.append(encoder(batch, torch.ones_like(batch))[0].numpy())
    return np.stack(rows)


def snapshot(source: CheckpointSource) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in source.state().items()}


def test_a_published_sentence_transformer_gives_the_same_vectors(
    theirs: SentenceTransformer, texts: list[str], tmp_path: Path
) -> None:
    source = source_of(theirs)
    source.save(tmp_path / "out", source.state())
    encoder = load_encoder(tmp_path / "out", safetensors_only=True)
    expected = theirs.encode_query(texts)
    np.testing.assert_allclose(vectors(encoder, texts), expected, atol=1e-5)
    assert encoder.settings.passage_prompt == "say: "
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(again.encode_query(texts), expected, atol=1e-6)
    assert not list(tmp_path.glob("out/README*"))


def test_a_sentence_transformers_snapshot_is_written_while_training_continues(
    theirs: SentenceTransformer, texts: list[str], tmp_path: Path
) -> None:
    source = source_of(theirs)
    before, expected = snapshot(source), theirs.encode_query(texts)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.1 * torch.randn_like(weight)
    after = {name: value.clone() for name, value in theirs.state_dict().items()}
    source.save(tmp_path / "first", before)
    source.save(tmp_path / "second", snapshot(source))
    first = vectors(load_encoder(tmp_path / "first"), texts)
    second = vectors(load_encoder(tmp_path / "second"), texts)
    np.testing.assert_allclose(first, expected, atol=1e-5)
    np.testing.assert_allclose(second, theirs.encode_query(texts), atol=1e-5)
    assert np.abs(first - second).max() > 0.01
    assert all(torch.equal(after[name], value) for name, value in theirs.state_dict().items())


def test_copying_a_sentence_transformer_takes_neither_memory_nor_its_trainer(
    theirs: SentenceTransformer,
) -> None:
    class Trainer:
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise AssertionError("the trainer, its data and its optimizer were copied")

    theirs.model_card_data.trainer = Trainer()
    shell = source_of(theirs)._shell  # type: ignore[attr-defined]
    assert {weight.device.type for weight in (*shell.parameters(), *shell.buffers())} == {"meta"}
    assert {weight.device.type for weight in theirs.parameters()} == {"cpu"}


def test_an_unsupported_sentence_transformer_is_refused_at_once(
    theirs: SentenceTransformer,
) -> None:
    class LSTM(nn.Module):
        pass

    theirs.append(LSTM())
    with pytest.raises(UsageError, match="a LSTM module is not supported"):
        source_of(theirs)


def test_unsupported_pooling_is_refused_at_once_and_when_written(
    theirs: SentenceTransformer, tmp_path: Path
) -> None:
    source = source_of(theirs)
    theirs[1].include_prompt = False
    with pytest.raises(UsageError, match="without the prompt's tokens"):
        source_of(theirs)
    source._shell[1].include_prompt = False
    with pytest.raises(CheckpointError, match="without the prompt's tokens"):
        source.save(tmp_path / "out", source.state())


def test_an_unsupported_similarity_is_refused_at_once(theirs: SentenceTransformer) -> None:
    theirs.similarity_fn_name = "euclidean"
    with pytest.raises(UsageError, match="compares by euclidean; expected cosine or dot"):
        source_of(theirs)


def test_a_hugging_face_model_is_published_with_the_given_settings(
    tiny: Encoder, texts: list[str], tmp_path: Path
) -> None:
    source = source_of(tiny.backbone, tiny.tokenizer, pooling="mean", normalize=True)
    before, expected = snapshot(source), vectors(tiny, texts)
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.zero_()
    source.save(tmp_path / "out", before)
    encoder = load_encoder(tmp_path / "out", safetensors_only=True)
    np.testing.assert_allclose(vectors(encoder, texts), expected, atol=1e-6)
    assert (encoder.settings.query_max_length, encoder.settings.passage_max_length) == (512, 512)


def test_all_settings_of_a_hugging_face_model_are_published(tiny: Encoder, tmp_path: Path) -> None:
    source = source_of(
        *(tiny.backbone, tiny.tokenizer),
        pooling="cls",
        normalize=False,
        query_prompt="query: ",
        passage_max_length=99,
    )
    source.save(tmp_path / "out", source.state())
    settings = load_encoder(tmp_path / "out").settings
    assert (settings.pooling, settings.normalize) == ("cls", False)
    assert (settings.query_prompt, settings.passage_max_length) == ("query: ", 99)
    assert settings.query_max_length == 512


def test_a_model_with_a_head_is_published_without_it(tiny: Encoder, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny.backbone.config)
    source = source_of(model, tiny.tokenizer, pooling="mean", normalize=True)
    assert not any("cls" in name or "bert." in name for name in source.state())
    source.save(tmp_path / "out", source.state())
    state = load_encoder(tmp_path / "out").backbone.state_dict()
    assert torch.equal(
        state["embeddings.word_embeddings.weight"], model.bert.get_input_embeddings().weight
    )


def test_a_hugging_face_model_without_tokenizer_or_pooling(tiny: Encoder) -> None:
    with pytest.raises(UsageError, match="a BertModel needs its tokenizer"):
        source_of(tiny.backbone, pooling="mean", normalize=True)
    with pytest.raises(UsageError, match="how its vectors are made; give pooling and normalize"):
        source_of(tiny.backbone, tiny.tokenizer)
    with pytest.raises(UsageError, match="give normalize, such as"):
        source_of(tiny.backbone, tiny.tokenizer, pooling="mean")
    with pytest.raises(UsageError, match="unknown setting 'poolin'; expected one of"):
        source_of(tiny.backbone, tiny.tokenizer, poolin="mean")
    with pytest.raises(UsageError, match="pooling 'mode'"):
        source_of(tiny.backbone, tiny.tokenizer, pooling="mode", normalize=True)


def test_settings_of_a_model_that_has_its_own_are_refused(
    tiny: Encoder, theirs: SentenceTransformer, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "ours", tiny)
    with pytest.raises(UsageError, match=r"an Encoder already defines .*; leave pooling out"):
        source_of(tiny, pooling="cls")
    with pytest.raises(UsageError, match="leave normalize out"):
        source_of(theirs, normalize=True)
    with pytest.raises(UsageError, match="leave tokenizer out"):
        source_of(tmp_path / "ours", tiny.tokenizer)


def test_a_directory_is_copied_without_files_of_trainers(
    theirs: SentenceTransformer, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-500"
    theirs.save(str(folder), create_model_card=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "mlflow_dr_complete.json"):
        (folder / name).write_bytes(b"large")
    (folder / "trainer_state.json").write_text("{}")
    before = sorted(path.name for path in folder.iterdir())
    source = source_of(str(folder))
    assert source.state() == {}
    source.save(tmp_path / "out", {})
    assert sorted(path.name for path in folder.iterdir()) == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "mlflow_dr_complete.json",
    }
    assert "trainer_state.json" not in names
    encoder = load_encoder(tmp_path / "out", safetensors_only=True)
    np.testing.assert_allclose(vectors(encoder, texts), theirs.encode_query(texts), atol=1e-5)


def test_the_directory_of_a_bare_backbone_needs_settings(
    tiny: Encoder, texts: list[str], tmp_path: Path
) -> None:
    tiny.backbone.save_pretrained(tmp_path / "bare")
    tiny.tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="bare does not define how its vectors are made"):
        source_of(tmp_path / "bare")
    source = source_of(tmp_path / "bare", pooling="mean", normalize=True)
    source.save(tmp_path / "out", source.state())
    expected = vectors(tiny, texts)
    np.testing.assert_allclose(vectors(load_encoder(tmp_path / "out"), texts), expected, atol=1e-6)


def test_a_missing_or_incomplete_directory_is_refused(
    theirs: SentenceTransformer, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="nowhere: not a directory"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json or model\*.safetensors is missing"):
        source_of(tmp_path)
    theirs.save(str(tmp_path / "pickled"), create_model_card=False)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="as safetensors"):
        check_directory(tmp_path / "pickled")


def test_wrappers_are_removed(tiny: Encoder, theirs: SentenceTransformer) -> None:
    assert unwrapped(nn.DataParallel(tiny)) is tiny
    assert unwrapped(torch.compile(tiny)) is tiny
    assert unwrapped(torch.compile(nn.DataParallel(theirs))) is theirs
    assert isinstance(source_of(torch.compile(tiny)), EncoderSource)
    assert not any("_orig_mod" in name for name in source_of(torch.compile(tiny)).state())


def test_distributed_data_parallel_is_removed(tiny: Encoder, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny)
        assert source_of(wrapped).state().keys() == tiny.state_dict().keys()
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused(tiny: Encoder) -> None:
    tiny.backbone.embeddings.word_embeddings.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks them
    with pytest.raises(UsageError, match=r"sharded .*publish the directory"):
        source_of(tiny)


def test_adapters_are_refused(tiny: Encoder, theirs: SentenceTransformer) -> None:
    theirs[0].auto_model._hf_peft_config_loaded = True
    with pytest.raises(UsageError, match="merge a copy of it"):
        source_of(theirs)
    backbone = copy.deepcopy(tiny.backbone)
    backbone._hf_peft_config_loaded = True
    with pytest.raises(UsageError, match="merge a copy of it"):
        source_of(backbone, tiny.tokenizer, pooling="mean", normalize=True)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), SimpleNamespace(), None])
def test_other_objects_are_refused(model: object) -> None:
    with pytest.raises(UsageError, match=f"a {type(model).__name__} cannot be published"):
        source_of(model)
