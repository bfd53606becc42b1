"""Directories that sentence-transformers saves: its vectors are ours, or a setting is refused.

One suite over small models of every published shape. The right answer is always the library's own:
`encode_query`, `encode_document` and `similarity`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    Dropout,
    LayerNorm,
    Pooling,
    StaticEmbedding,
)
from torch import nn

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import CheckpointError
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.stores.token_table import token_table

WIDTH = 16
QUERIES = ["Who keeps the lighthouse?", "tide", "When does the FERRY return to the island at noon?"]
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LEFT = {"num_key_value_heads": 2, "head_dim": 8, "architectures": ["Qwen3ForCausalLM"]}
# backbones of the published encoders: configuration, its values, class
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL),
    "roberta": ("Roberta", SMALL),
    "xlm-roberta": ("XLMRoberta", SMALL),
    "mpnet": ("MPNet", SMALL),
    "data2vec": ("Data2VecText", SMALL),
    "distilbert": (
        "DistilBert",
        {
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "modernbert": ("ModernBert", SMALL | {"cls_token_id": 2, "sep_token_id": 3}),
    "qwen3": ("Qwen3", SMALL | LEFT),
    "gemma3": ("Gemma3Text", SMALL | LEFT | {"use_bidirectional_attention": True}),
    "longt5": ("LongT5", T5 | {"encoder_attention_type": "local"}),
    "t5": ("T5", T5),
    "funnel": (
        "Funnel",
        {
            "d_model": WIDTH,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
}


@pytest.fixture
def backbone(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Callable[..., Transformer]:
    """A function from the name of a backbone to the library's module of a small one."""
    tokenizer = make_tiny().tokenizer

    def make(name: str = "bert", seed: int = 0, padding: str = "right", **options: Any) -> Any:
        kind, values = BACKBONES[name]
        special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        config = getattr(transformers, f"{kind}Config")(
            **{**special, **values}, vocab_size=len(tokenizer)
        )
        folder = tmp_path / f"{name}-{seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, f"{kind}Model")(config)
            for weight in model.parameters():  # so that vectors of different texts differ
                weight.data.add_(torch.randn_like(weight) * 0.2)
        model.save_pretrained(folder)
        tokenizer.padding_side = padding
        tokenizer.save_pretrained(folder)
        return Transformer(str(folder), **options)

    return make


def saved(tmp_path: Path, parts: list[nn.Module], **options: Any) -> Path:
    """Where the library saves a model of these modules."""
    model = SentenceTransformer(modules=parts, device="cpu", **options)
    model.save(str(tmp_path / "model"), create_model_card=False)
    return tmp_path / "model"


def vectors(encoder: Encoder, what: str, texts: list[str]) -> np.ndarray:
    encoder_of_text = encoder.query_encoder if what == "query" else encoder
    made = TextTokenizer.of(encoder_of_text)
    if what == "query":
        ids = made.query_ids([Query("", text) for text in texts])
    else:
        ids = made.passage_ids([Passage("", "", text) for text in texts])
    return encode_all(encoder_of_text, token_table(ids), made.pad_id).numpy()


def agrees(directory: Path, texts: list[str], again: Path | None = None) -> Encoder:
    """Hold scores and, unless a length of 1 is added for the cosine, vectors against the library's.

    What we save of the encoder has to give the same scores once more, to us and to the library.
    """
    encoder = load_encoder(directory)
    theirs = SentenceTransformer(str(directory), device="cpu")
    # one by one: a text's vector must not depend on its neighbours
    queries, passages = (
        encode(rows, batch_size=1)
        for encode, rows in ((theirs.encode_query, QUERIES), (theirs.encode_document, texts))
    )
    ours = vectors(encoder, "query", QUERIES), vectors(encoder, "document", texts)
    scores = theirs.similarity(queries, passages).numpy()
    scale = max(1.0, float(np.abs(scores).max()))
    np.testing.assert_allclose(ours[0] @ ours[1].T, scores, rtol=0, atol=1e-5 * scale)
    if again is not None:
        save_encoder(again, encoder)
        loaded = load_encoder(again)
        kept = vectors(loaded, "query", QUERIES) @ vectors(loaded, "document", texts).T
        np.testing.assert_allclose(kept, scores, rtol=0, atol=1e-5 * scale)
        theirs = SentenceTransformer(str(again), device="cpu")
        found = theirs.similarity(
            theirs.encode_query(QUERIES, batch_size=1), theirs.encode_document(texts, batch_size=1)
        )
        np.testing.assert_allclose(found.numpy(), scores, rtol=0, atol=1e-5 * scale)
    return encoder


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "funnel"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_backbones(
    name: str, pooling: Any, backbone: Any, tmp_path: Path, texts: list[str]
) -> None:
    # beyond its positions, which some count from 1 or 2, a backbone fails in the library's hands
    directory = saved(tmp_path, [backbone(name, max_seq_length=60), Pooling(WIDTH, pooling)])
    agrees(directory, [*texts, " ".join(texts)])


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_texts_are_cut_at_the_positions_of_the_backbone(
    name: str, backbone: Any, tmp_path: Path, texts: list[str]
) -> None:
    encoder = load_encoder(saved(tmp_path, [backbone(name), Pooling(WIDTH)]))
    expected = {"bert": 64, "roberta": 63, "mpnet": 62}[name]
    assert encoder.settings.passage_max_length == expected
    assert np.isfinite(vectors(encoder, "document", [" ".join(texts)])).all()


def test_a_backbone_whose_vectors_depend_on_token_types_or_padding_is_refused(
    backbone: Any, tmp_path: Path
) -> None:
    directory = saved(tmp_path, [backbone("funnel"), Pooling(WIDTH, "cls")])
    with pytest.raises(CheckpointError, match=r"differ from sentence-transformers' by .* setting"):
        load_encoder(directory)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_token_of_a_decoder(
    padding: str, backbone: Any, tmp_path: Path, texts: list[str]
) -> None:
    parts = [backbone("qwen3", padding=padding), Pooling(WIDTH, "lasttoken"), Normalize()]
    prompts = {"query": "Instruct: find\nQuery:"}
    agrees(saved(tmp_path, parts, prompts=prompts), texts, tmp_path / "again")


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "MiniLM": lambda: [Pooling(WIDTH), Normalize()],
    "BGE": lambda: [Pooling(WIDTH, "cls"), Normalize()],
    "GTE": lambda: [Pooling(WIDTH)],
    "EmbeddingGemma": lambda: [
        Pooling(WIDTH),
        Dense(WIDTH, 32, bias=False, activation_function=nn.Identity()),
        Dense(32, WIDTH, bias=False, activation_function=nn.Identity()),
        Normalize(),
    ],
    "several poolings": lambda: [Pooling(WIDTH, ("mean", "max", "cls"))],
    "residual": lambda: [Pooling(WIDTH), Dense(WIDTH, WIDTH, use_residual=True)],
    "residual of another width": lambda: [Pooling(WIDTH), Dense(WIDTH, 8, use_residual=True)],
    "tokens": lambda: [Dense(WIDTH, 8, module_input_name="token_embeddings"), Pooling(8)],
    "normalised tokens": lambda: [Normalize("token_embeddings"), Pooling(WIDTH)],
    "normalised before": lambda: [Pooling(WIDTH), Normalize(), Dense(WIDTH, 8)],
    "an activation of torch": lambda: [
        Pooling(WIDTH),
        Dense(WIDTH, 8, activation_function=nn.Mish()),
    ],
    "layer norm": lambda: [Pooling(WIDTH), LayerNorm(WIDTH)],
    "dropout": lambda: [Pooling(WIDTH), Dropout(0.5), Normalize()],
}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, similarity: Any, backbone: Any, tmp_path: Path, texts: list[str]) -> None:
    directory = saved(tmp_path, [backbone(), *HEADS[name]()], similarity_fn_name=similarity)
    agrees(directory, texts, tmp_path / "again")


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan"])
def test_other_similarities_are_refused_unless_the_user_chooses(
    similarity: Any, backbone: Any, tmp_path: Path
) -> None:
    directory = saved(tmp_path, [backbone(), Pooling(WIDTH)], similarity_fn_name=similarity)
    with pytest.raises(CheckpointError, match=f"similarity_fn_name '{similarity}'"):
        load_encoder(directory)
    assert load_encoder(directory, normalize=True).settings.normalize


PROMPTS: list[dict[str, Any]] = [
    {"prompts": {"query": "query: ", "document": "passage: "}},  # E5
    {"prompts": {"query": "task: find | query: ", "document": "title: none | text: "}},
    {"prompts": {"query": "query: ", "passage": "passage: "}},
    {"prompts": {"query": "", "any": "find: "}, "default_prompt_name": "any"},
    {"prompts": {"any": "find: "}, "default_prompt_name": "any"},
]


@pytest.mark.parametrize("options", PROMPTS)
def test_prompts(options: Any, backbone: Any, tmp_path: Path, texts: list[str]) -> None:
    agrees(saved(tmp_path, [backbone(), Pooling(WIDTH)], **options), texts, tmp_path / "again")


@pytest.mark.parametrize(
    "options",
    [
        {"query_length": 5, "document_length": 9},
        {"query_length": 5},
        {"document_length": 9},
        {"max_seq_length": 7},
        {"processing_kwargs": {"text": {"max_length": 6}}},
        {"do_lower_case": True},
    ],
    ids=str,
)
def test_lengths_and_case(options: Any, backbone: Any, tmp_path: Path, texts: list[str]) -> None:
    agrees(saved(tmp_path, [backbone(**options), Pooling(WIDTH)]), texts, tmp_path / "again")


def static(tokenizer: Any, seed: int = 0) -> StaticEmbedding:
    table = torch.randn(len(tokenizer), WIDTH, generator=torch.Generator().manual_seed(seed))
    return StaticEmbedding(tokenizer, embedding_weights=table)


def test_static_embeddings(
    make_tiny: Callable[..., Encoder], tmp_path: Path, texts: list[str]
) -> None:
    parts = [static(make_tiny().tokenizer), Normalize()]
    agrees(saved(tmp_path, parts), [*texts, " ".join(texts)], tmp_path / "again")


@pytest.mark.parametrize("shape", ["two backbones", "static queries", "heads", "one route"])
def test_asymmetric_models(
    shape: str,
    backbone: Any,
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    texts: list[str],
) -> None:
    documents = [backbone(), Pooling(WIDTH)]
    parts = {
        "two backbones": lambda: [
            Router.for_query_document([backbone(seed=1, query_length=4), Pooling(WIDTH)], documents)
        ],
        "static queries": lambda: [
            Router.for_query_document([static(make_tiny().tokenizer)], documents)
        ],
        "heads": lambda: [
            *documents,
            Router.for_query_document([Dense(WIDTH, 8)], [Dense(WIDTH, 8)]),
        ],
        "one route": lambda: [Router({"document": documents}, default_route="document")],
    }[shape]()
    directory = saved(tmp_path, parts, prompts={"query": "ask: ", "document": ""})
    if shape == "one route":  # the library itself finds no route for queries
        with pytest.raises(CheckpointError, match="No route found for task type 'query'"):
            load_encoder(directory)
        return
    encoder = agrees(directory, texts, tmp_path / "again")
    assert encoder.untied_query_encoder is not None


@pytest.mark.parametrize("version", [2, 3, 5])
def test_layouts_of_older_versions(
    version: int, backbone: Any, tmp_path: Path, texts: list[str]
) -> None:
    """As the library wrote them: flags of poolings, no lengths by task, `0_Transformer`."""
    directory = saved(tmp_path, [backbone(), Pooling(WIDTH), Dense(WIDTH, 8), Normalize()])
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    flags = {f"pooling_mode_{name}": name == "max_tokens" for name in names}
    old = {"word_embedding_dimension": WIDTH, **flags}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(old))
    dense = json.loads((directory / "2_Dense" / "config.json").read_text())
    for key in ("module_input_name", "module_output_name"):
        dense.pop(key)
    (directory / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (directory / "3_Normalize" / "config.json").unlink()
    values: dict[str, Any] = {"max_seq_length": 9, "do_lower_case": False}
    (directory / "sentence_bert_config.json").write_text(json.dumps(values))
    listed = json.loads((directory / "modules.json").read_text())
    for module in listed:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.models.{kind}"
    about: dict[str, Any] = {"__version__": {"sentence_transformers": f"{version}.0.0"}}
    if version == 2:
        (directory / "0_Transformer").mkdir()
        listed[0]["path"] = "0_Transformer"
        for path in [path for path in directory.iterdir() if path.is_file()]:
            if path.name not in ("modules.json", "config_sentence_transformers.json"):
                path.rename(directory / "0_Transformer" / path.name)
    else:
        about |= {"prompts": {"query": "ask: "}, "default_prompt_name": None}
    if version == 5:
        about |= {"similarity_fn_name": "dot", "model_type": "SentenceTransformer"}
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(about))
    encoder = agrees(directory, texts)
    assert encoder.settings.pooling == "max"
    assert encoder.settings.passage_max_length == 9


def test_a_cross_encoder_is_refused(backbone: Any, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    bert = backbone()
    CrossEncoder(str(tmp_path / "bert-0"), num_labels=1, device="cpu").save_pretrained(
        str(tmp_path / "scorer"), create_model_card=False
    )
    with pytest.raises(CheckpointError, match="CrossEncoder"):
        load_encoder(tmp_path / "scorer")
    (tmp_path / "scorer" / "modules.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="ForSequenceClassification' scores texts or pairs"):
        load_encoder(tmp_path / "scorer")
    assert bert is not None


def test_a_prompt_that_is_not_pooled_is_refused(backbone: Any, tmp_path: Path) -> None:
    parts = [backbone(), Pooling(WIDTH, include_prompt=False)]
    directory = saved(tmp_path, parts, prompts={"query": "ask: "})
    with pytest.raises(CheckpointError, match="include_prompt is false"):
        load_encoder(directory)
