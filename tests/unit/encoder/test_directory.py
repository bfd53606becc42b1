"""The encoder's directory: three loaders give one encoder, and no damaged one is loaded."""

import json
import logging
import math
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers import AutoModel, AutoTokenizer

from mlflow_dr.background import BackgroundTask
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.backbone import loading_alone
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.stores.token_table import token_table

Make = Callable[..., Encoder]

IDENTITY = nn.Identity()
SETTINGS: dict[str, Any] = {
    "pooling": "mean",
    "normalize": True,
    "query_prompt": "query: ",
    "passage_prompt": "passage: ",
    "query_max_length": 16,
    "passage_max_length": 24,
}
FULL = {**SETTINGS, "projections": (Dense(128, 32, activation_function=nn.Tanh()),)}

SENTENCES = (
    "",
    "?",
    "Rain.",
    "who invented the telescope",
    "What is the capital of Mongolia?",
    "how long does it take to boil an egg at high altitude",
    "The cat sat on the mat.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "In 1905 Albert Einstein published four papers that changed physics for good.",
    "Bread rises because yeast gives off carbon dioxide while it feeds on the flour's sugars.",
    "The Danube flows through ten countries before it reaches the Black Sea.",
    "A violin has four strings, tuned in perfect fifths.",
    "Is it safe to charge a phone overnight?",
    "Mount Everest is 8,848.86 m high; K2 is 8,611 m.",
    "Inflation erodes the value of money that is kept under the mattress.",
    "The Great Fire of London began in a bakery in Pudding Lane in September 1666.",
    "Penicillin was discovered by accident, when mould grew on a dish of bacteria.",
    "Bees dance to tell one another where the flowers are.",
    "def add(a, b): return a + b",
    "https://example.org/a/long/path?with=parameters&and=more",
    "naïve café, Zürich, Łódź, 東京, Москва, 😀",
    "UPPER CASE AND lower case Are One To An Uncased Model",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "the the the the the the the the the the",
    "A checkpoint is a copy of a model's weights at one moment of its training.",
    "Cholera spreads through water; John Snow showed it in 1854 by mapping a pump in Soho.",
    "Glaciers move: slowly at the bed, faster in the middle, and fastest of all after rain.",
    "Tabs\tand\nline ends   and   many   spaces.",
)
OVER_LONG = " ".join(SENTENCES) + " The last words are beyond the longest length. " * 20


def query_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    made = TextTokenizer.of(encoder)
    ids = made.query_ids([Query("", text) for text in texts])
    return encode_all(encoder, token_table(ids), made.pad_id).numpy()


def passage_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    made = TextTokenizer.of(encoder)
    ids = made.passage_ids([Passage("", "", text) for text in texts])
    return encode_all(encoder, token_table(ids), made.pad_id).numpy()


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def sentence_transformer(directory: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(directory), device="cpu")


@pytest.fixture
def saved(make_tiny: Make, tmp_path: Path) -> Path:
    """A directory of ours with everything in it."""
    save_encoder(tmp_path / "encoder", make_tiny(**FULL))
    return tmp_path / "encoder"


@pytest.fixture
def library_directory(saved: Path) -> Path:
    """The same without our own file, so that it is read as sentence-transformers'."""
    (saved / "mlflow_dr.json").unlink()
    return saved


OWN = {"title_separator": " ", "strip_question_mark": False}


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- there and back -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [FULL, {}], ids=["full", "default"])
def test_a_saved_encoder_is_loaded(
    make_tiny: Make, tmp_path: Path, texts: list[str], settings: dict[str, Any]
) -> None:
    encoder = make_tiny(**settings)
    save_encoder(tmp_path / "encoder", encoder)
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.settings == encoder.settings
    assert loaded.dimension == encoder.dimension == (32 if settings else 128)
    assert not loaded.training
    expected = encoder.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    close(query_vectors(loaded, texts), query_vectors(encoder, texts))


@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        {"pooling": "cls"},
        {
            "pooling": "last",
            "projections": (Dense(128, 64, bias=False, activation_function=IDENTITY),),
        },
        {
            "pooling": "max",
            "projections": (
                Dense(128, 64, activation_function=nn.GELU()),
                Dense(64, 16, activation_function=nn.ReLU()),
            ),
        },
        {"pooling": "mean_sqrt_len", "query_max_length": 7, "passage_max_length": 7},
        {
            "pooling": "weighted_mean",
            "normalize": True,
            "projections": (Dense(128, 8, activation_function=nn.Sigmoid()),),
        },
    ],
    ids=lambda settings: settings["pooling"],
)
def test_sentence_transformers_gives_the_same_vectors(
    make_tiny: Make, tmp_path: Path, texts: list[str], settings: dict[str, Any]
) -> None:
    encoder = make_tiny(**settings)
    save_encoder(tmp_path / "encoder", encoder)
    theirs = sentence_transformer(tmp_path / "encoder")
    long = [*texts, " ".join(texts)]
    close(passage_vectors(encoder, long), theirs.encode(long, prompt_name="document"))
    short = ["tide", "a ship", "gull"]  # it has one length only: the passages'
    close(query_vectors(encoder, short), theirs.encode(short, prompt_name="query"))
    assert theirs.max_seq_length == encoder.settings.passage_max_length


def test_auto_model_loads_the_backbone(make_tiny: Make, saved: Path, texts: list[str]) -> None:
    backbone = make_tiny(**FULL).backbone
    loaded = AutoModel.from_pretrained(saved, add_pooling_layer=False)
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, backbone.state_dict()[name], rtol=0, atol=0)
    ours = load_encoder(saved).tokenizer
    assert AutoTokenizer.from_pretrained(saved)(texts).input_ids == ours(texts).input_ids


def test_a_snapshot_replaces_the_encoders_own_weights(make_tiny: Make, tmp_path: Path) -> None:
    encoder = make_tiny(**FULL)
    snapshot = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    for weight in encoder.parameters():
        weight.data.add_(1.0)
    save_encoder(tmp_path / "encoder", encoder, snapshot)
    for name, weight in load_encoder(tmp_path / "encoder").state_dict().items():
        torch.testing.assert_close(weight, snapshot[name], rtol=0, atol=0)


def test_an_encoder_is_not_overwritten(make_tiny: Make, saved: Path) -> None:
    with pytest.raises(FileExistsError):
        save_encoder(saved, make_tiny())


# --- directories of others ------------------------------------------------------------------


@pytest.fixture
def saved_by_library(saved: Path, tmp_path: Path) -> Path:
    """A directory that sentence-transformers writes itself, with a projection and prompts."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    backbone = tmp_path / "backbone"
    shutil.copytree(saved, backbone)
    for name in ("mlflow_dr.json", "modules.json"):
        (backbone / name).unlink()
    torch.manual_seed(5)
    model = SentenceTransformer(
        modules=[
            Transformer(str(backbone), max_seq_length=12),
            Pooling(128, pooling_mode="mean"),
            Dense(128, 24, activation_function=torch.nn.Tanh()),
            Dense(24, 10, bias=False, activation_function=torch.nn.Identity()),
            Normalize(),
        ],
        prompts={"query": "ask: ", "document": "answer: "},
        device="cpu",
    )
    model.save(str(tmp_path / "theirs"))
    return tmp_path / "theirs"


def test_a_directory_of_sentence_transformers_is_loaded(
    saved_by_library: Path, texts: list[str]
) -> None:
    encoder = load_encoder(saved_by_library)
    assert encoder.settings == EncoderConfig(
        pooling="mean",
        normalize=True,
        query_prompt="ask: ",
        passage_prompt="answer: ",
        query_max_length=12,
        passage_max_length=12,
    )
    assert [(layer.out_features, layer.bias) for layer in encoder.head[1:3]] == [
        (24, True),
        (10, False),
    ]
    theirs = sentence_transformer(saved_by_library)
    close(query_vectors(encoder, texts), theirs.encode_query(texts))
    close(passage_vectors(encoder, texts), theirs.encode_document(texts))


def test_all_minilm_gives_the_vectors_of_sentence_transformers(minilm: Path) -> None:
    encoder = load_encoder(minilm)
    assert encoder.settings == EncoderConfig(
        "mean", normalize=True, query_max_length=256, passage_max_length=256
    )
    sentences = [*SENTENCES, OVER_LONG]
    lengths = [len(ids) for ids in encoder.tokenizer(sentences).input_ids]
    assert len(sentences) == 30
    assert (min(lengths), max(lengths) > 256) == (2, True)
    theirs = sentence_transformer(minilm).encode(sentences)
    close(passage_vectors(encoder, sentences), theirs)
    close(query_vectors(encoder, sentences), theirs)


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"prompts": {"query": "q ", "document": "d "}}, None),
        ({"prompts": {"query": "q ", "passage": "p "}}, "passage"),
        ({"prompts": {"query": "q ", "corpus": "c "}}, "corpus"),
        ({"prompts": {"query": "q "}}, None),
        ({"prompts": {"any": "a "}, "default_prompt_name": "any"}, "any"),
        ({"prompts": {"query": "", "any": "a "}, "default_prompt_name": "any"}, "any"),
        ({"prompts": {}, "default_prompt_name": None}, None),
    ],
)
def test_prompts_are_read_as_the_library_reads_them(
    library_directory: Path,
    values: dict[str, Any],
    unused: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (library_directory / "config_sentence_transformers.json").write_text(json.dumps(values))
    settings = load_encoder(library_directory).settings
    theirs = sentence_transformer(library_directory)
    used = []
    monkeypatch.setattr(theirs, "encode", lambda inputs, **options: used.append(options))
    theirs.encode_query(["a"])
    theirs.encode_document(["a"])
    prompts = [
        theirs._resolve_prompt(options["prompt"], options["prompt_name"]) for options in used
    ]
    assert [settings.query_prompt, settings.passage_prompt] == prompts
    assert (unused is not None) == ("does not put before" in caplog.text)
    assert repr(unused or "") in caplog.text or unused is None


def test_optional_files_may_be_missing(library_directory: Path) -> None:
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (library_directory / name).unlink()
    settings = load_encoder(library_directory).settings
    assert (settings.query_prompt, settings.passage_max_length) == ("", 512)


def test_a_bare_backbone_gets_mean_pooling_with_a_warning(
    library_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (library_directory / "modules.json").unlink()
    assert load_encoder(library_directory).settings == EncoderConfig(
        "mean", query_max_length=512, passage_max_length=512
    )
    assert "is a bare backbone; its pooling is mean" in caplog.text
    caplog.clear()
    assert load_encoder(library_directory, pooling="cls").settings.pooling == "cls"
    assert not caplog.records


def test_a_bare_backbone_for_texts_without_words_is_refused(library_directory: Path) -> None:
    (library_directory / "modules.json").unlink()
    path = library_directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 1}))
    with pytest.raises(CheckpointError, match="allow texts of 1 tokens"):
        load_encoder(library_directory)


def test_an_empty_name_is_not_this_directory() -> None:
    with pytest.raises(UsageError, match="the encoder's name is empty"):
        load_encoder("")


def test_changes_override_the_settings_of_the_directory(saved: Path) -> None:
    settings = load_encoder(saved, query_prompt="other: ", normalize=False).settings
    assert settings == EncoderConfig(**SETTINGS | {"query_prompt": "other: ", "normalize": False})
    with pytest.raises(UsageError, match="pooling 'middle'"):
        load_encoder(saved, pooling="middle")


def test_transformers_is_kept_quiet(
    saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_encoder(saved)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# --- what is refused ------------------------------------------------------------------------


def refused(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_encoder(directory, **options)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "2_Dense/model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "mlflow_dr.json",
    ],
)
def test_a_truncated_file(saved: Path, name: str) -> None:
    truncate(saved / name)
    refused(saved, "cannot be read")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "no file named model.safetensors"),
        ("2_Dense/model.safetensors", "2_Dense|linear.weight|model.safetensors"),
        ("config.json", "cannot be read"),
        ("tokenizer.json", "the tokenizer has only special tokens"),
    ],
)
def test_a_missing_file(saved: Path, name: str, message: str) -> None:
    (saved / name).unlink()
    refused(saved, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, r"16 weights of the backbone are not in the file.*\(bert\)"),
        ({"model_type": "distilbert"}, r"weights of the backbone are not in the file"),
        ({"hidden_size": 64}, "cannot be read"),
        ({"model_type": "nonesuch"}, "cannot be read.*nonesuch"),
    ],
    ids=["more layers", "another kind", "another width", "unknown kind"],
)
def test_another_architecture(saved: Path, values: dict[str, Any], message: str) -> None:
    change_json(saved / "config.json", **values)
    refused(saved, message)


def test_a_tokenizer_with_more_tokens_than_the_backbone_embeds(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    size = len(tokenizer)
    tokenizer.add_tokens(["zeppelin"])
    tokenizer.save_pretrained(saved)
    refused(saved, f"token ids up to {size}, but the backbone embeds only {size} tokens")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"layout": 3, "unheard": "of", "encoder": {}},
            "layout 3 was written by another version of mlflow_dr; this version reads layout 2",
        ),
        ({"layout": 1, "encoder": {}}, "layout 1 was written by another version"),
        ({"encoder": {}}, "'layout'"),
        ({"layout": 2}, "'encoder'"),
        ({"layout": 2, "encoder": {}}, "encoder is {}; expected title_separator"),
        ({"layout": "2", "encoder": {}}, "layout '2' was written by another version"),
        ({"layout": 2, "encoder": OWN | {"title_separator": 3}}, r"3.*; .*title_separator \(str\)"),
        ({"layout": 2, "encoder": OWN | {"strip_question_mark": "no"}}, r"'no'.*; .*mark \(bool\)"),
        ({"layout": 2, "encoder": {"poling": "cls"}}, "'poling'.*; expected title_separator"),
        ({"layout": 2, "encoder": ["cls"]}, "mlflow_dr.json: cannot be read"),
        (["cls"], "mlflow_dr.json: cannot be read"),
    ],
)
def test_a_malformed_description(saved: Path, values: Any, message: str) -> None:
    (saved / "mlflow_dr.json").write_text(json.dumps(values))
    refused(saved, message)


ST = "sentence_transformers.models."
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": f"{ST}Transformer"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("modules.json", [{"type": f"{ST}CNN", "path": ""}], "module .*CNN' is not supported"),
        ("modules.json", [{"type": "os.system", "path": ""}], "module .*system' is not supported"),
        ("modules.json", [TRANSFORMER | {"path": "../x"}], "leads out of the directory"),
        (
            "modules.json",
            [TRANSFORMER | {"path": ["x"]}],
            "modules.json: not as .* not the type and path",
        ),
        ("modules.json", [TRANSFORMER | {"kwargs": ["task"]}], "kwargs .* are not supported"),
        (
            "modules.json",
            [
                {"idx": 0, "name": "0", "type": f"{ST}Normalize", "path": "3_Normalize"},
                {"idx": 1, "name": "1", "type": f"{ST}Dense", "path": "2_Dense"},
            ],
            "expected Transformer or StaticEmbedding, then Pooling",
        ),
        ("modules.json", [TRANSFORMER], "reads sentence_embedding, but no module before it"),
        ("modules.json", [{"idx": 0}], "modules.json: not as .* writes it"),
        ("modules.json", [TRANSFORMER, "Pooling"], "modules.json: not as .* writes it"),
        ("1_Pooling/config.json", {}, "Pooling.*embedding_dimension"),
        (
            "1_Pooling/config.json",
            {"embedding_dimension": 128, "pooling_mode": "middle"},
            "Invalid pooling mode: 'middle'",
        ),
        (
            "1_Pooling/config.json",
            {"embedding_dimension": 128, "pooling_mode": ["mean", "max"]},
            "takes 128 dimensions, but the layer before it gives 256",
        ),
        (
            "1_Pooling/config.json",
            {"embedding_dimension": 128, "pooling_mode": "mean", "include_prompt": False},
            "without the prompt's tokens is not supported",
        ),
        ("1_Pooling/config.json", ["mean"], "1_Pooling/config.json: not as .* writes it"),
        ("2_Dense/config.json", {"in_features": 128}, "Dense.*out_features"),
        (
            "3_Normalize/config.json",
            {"module_output_name": ["elsewhere"]},
            r"module Normalize works on .*elsewhere",
        ),
        ("2_Dense/config.json", {"in_features": 128, "out_features": 31}, "size mismatch"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 32}, "size mismatch"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "cannot be read"),
        ("sentence_bert_config.json", [16], "not as .* writes it"),
        (
            "sentence_bert_config.json",
            {"document_length": math.nan},
            "cannot be interpreted as an integer",
        ),
        ("sentence_bert_config.json", {"query_length": -1}, "query_max_length is -1"),
        ("config_sentence_transformers.json", {"prompts": 3}, "not as .* writes it"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "not as .* writes it"),
        (
            "config_sentence_transformers.json",
            {"model_type": "CrossEncoder"},
            "the model is a 'CrossEncoder'",
        ),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "manhattan"},
            "similarity_fn_name 'manhattan' is not supported; choose cosine with --normalize",
        ),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 8}}, "query_expansion has"),
        (
            "sentence_bert_config.json",
            {"processing_kwargs": {"text": {"add_special_tokens": False}}},
            "processing_kwargs.text.add_special_tokens has a value",
        ),
        (
            "sentence_bert_config.json",
            {"model_args": {"weights_only": False}},
            "model_args.weights_only has a value",
        ),
    ],
)
def test_a_malformed_or_unsupported_sentence_transformer(
    library_directory: Path, name: str, values: Any, message: str
) -> None:
    (library_directory / name).write_text(json.dumps(values))
    refused(library_directory, message)


def test_our_own_file_is_a_dangling_link(saved: Path) -> None:
    (saved / "mlflow_dr.json").unlink()
    (saved / "mlflow_dr.json").symlink_to("nowhere")
    refused(saved, "mlflow_dr.json: cannot be read")


def test_the_list_of_modules_is_a_dangling_link(library_directory: Path) -> None:
    """It is no bare backbone for that."""
    (library_directory / "modules.json").unlink()
    (library_directory / "modules.json").symlink_to("nowhere")
    refused(library_directory, "modules.json: not as sentence-transformers writes it")


def test_a_tokenizer_that_cannot_read_a_text(saved: Path, texts: list[str]) -> None:
    path = saved / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "unk_token": ""}))
    with pytest.raises(CheckpointError, match=f"{saved}: the tokenizer cannot make token ids"):
        query_vectors(load_encoder(saved), ["\u4e00 a word that was not learnt"])


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "2_Dense/config.json"])
def test_a_truncated_file_of_a_sentence_transformer(library_directory: Path, name: str) -> None:
    truncate(library_directory / name)
    refused(library_directory, f"{name}: not as sentence-transformers writes it")


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/config.json"])
def test_a_missing_file_of_a_sentence_transformer(library_directory: Path, name: str) -> None:
    (library_directory / name).unlink()
    refused(library_directory, f"{name} is missing")


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read")


# --- no code is run -------------------------------------------------------------------------


def pickled(directory: Path) -> None:
    """The weights in PyTorch's older format."""
    backbone = AutoModel.from_pretrained(directory, add_pooling_layer=False)
    torch.save(backbone.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def test_pickled_weights_are_read_unless_safetensors_are_required(saved: Path) -> None:
    pickled(saved)
    assert load_encoder(saved).settings == EncoderConfig(**SETTINGS)
    refused(saved, "no file named model.safetensors", safetensors_only=True)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_pickle_that_runs_code_is_refused(saved: Path, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    pickled(saved)
    torch.save({"embeddings": Payload(tmp_path / "ran")}, saved / "pytorch_model.bin")
    refused(saved, "contain code, which is not run")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_directory_is_not_run(saved: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (saved / "custom.py").write_text(code)
    change_json(
        saved / "config.json",
        model_type="custom",
        auto_map={"AutoConfig": "custom.Config", "AutoModel": "custom.Model"},
    )
    refused(saved, "cannot be read")
    assert not (tmp_path / "ran").exists()


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "not a directory, and the Hugging Face hub cannot be reached"),
        ("no-such-model", "not a directory, and the Hugging Face hub cannot be reached"),
        ("./no-such-model", "not a directory"),
        ("/no/such/model", "not a directory"),
        ("~/no-such-model", "not a directory"),
        ("runs/17/model", "not a directory"),
    ],
)
def test_an_unknown_name(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_encoder(name)


def test_a_file_is_not_an_encoder(saved: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        load_encoder(saved / "model.safetensors")


def test_an_old_sentence_transformers_directory(minilm: Path, tmp_path: Path) -> None:
    """Backbone in `0_Transformer`, and the projection's weights as a pickle of tensors."""
    old = tmp_path / "old"
    shutil.copytree(minilm, old / "0_Transformer", ignore=shutil.ignore_patterns("1_*", "modules*"))
    shutil.copytree(minilm / "1_Pooling", old / "1_Pooling")
    (old / "2_Dense").mkdir()
    (old / "2_Dense" / "config.json").write_text(
        '{"in_features": 384, "out_features": 8, "bias": true, '
        '"activation_function": "torch.nn.modules.activation.Tanh"}'
    )
    weights = {"linear.weight": torch.randn(8, 384), "linear.bias": torch.randn(8)}
    torch.save(weights, old / "2_Dense" / "pytorch_model.bin")
    kinds = (("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (old / "modules.json").write_text(json.dumps(modules))
    encoder = load_encoder(old)
    assert encoder.dimension == 8
    assert encoder.settings.passage_max_length == 256
    assert torch.equal(encoder.head[1].linear.weight, weights["linear.weight"])
    with pytest.raises(CheckpointError, match="2_Dense"):
        load_encoder(old, safetensors_only=True)


def test_one_encoder_is_loaded_at_a_time(make_tiny: Callable[..., Encoder], tmp_path: Path) -> None:
    """transformers changes its own classes meanwhile; two threads would leave them changed."""
    save_encoder(tmp_path / "encoder", make_tiny(pooling="mean"))
    with loading_alone():
        task = BackgroundTask(partial(load_encoder, tmp_path / "encoder"), "loading")
        assert task.wait(0.3) is None
        assert not task.is_done
    assert isinstance(task.wait(60), Encoder)
