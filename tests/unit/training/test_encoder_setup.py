"""Flags of model and data: each changes the encoder or the training set that is made of it."""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from mlflow_dr.encoder import token_table
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, DataError, UsageError
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.batches import LateTokens, TrainingSet
from mlflow_dr.training.data import Mixture, TrainingData, open_data
from mlflow_dr.training.encoder_setup import build_encoder, collator_of, mixed_training_set
from mlflow_dr.training.parsing import parse_training

Make = Callable[..., Any]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 6, 3, 0, 0]])
MASK = (IDS != 0).long()


class Built(NamedTuple):
    """What is built from flags."""

    request: TrainingRequest
    data: TrainingData
    encoder: Encoder

    @property
    def set(self) -> Any:
        return mixed_training_set(self.request, self.data, self.encoder)

    def text(self, ids: Any, queries: bool = False) -> str:
        side = self.encoder.query_encoder if queries else self.encoder
        return side.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture
def build(folder: Path, saved: Path) -> Callable[..., Built]:
    """A function from flags to the encoder and data that they describe; the model is `saved`."""

    def build(*flags: object, dataset: object = folder, model: object = saved) -> Built:
        argv = ["--dataset", dataset, "--model", model, "--use_cpu", *flags]
        request = parse_training([str(arg) for arg in argv])
        data = open_data(request.data)
        encoder = build_encoder(request, data, request.model.model_name_or_path)
        return Built(request, data, encoder)

    return build


def test_settings_without_a_flag_come_from_the_directory(build: Callable[..., Built]) -> None:
    settings = build().encoder.settings
    assert (settings.pooling, settings.query_prompt) == ("mean", "")
    assert (settings.query_max_length, settings.passage_max_length) == (32, 128)


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("--pooling", "cls", "pooling", "cls"),
        ("--normalize", "false", "normalize", False),
        ("--query_prefix", "query: ", "query_prompt", "query: "),
        ("--passage_prefix", "passage: ", "passage_prompt", "passage: "),
        ("--passage_field_separator", " | ", "title_separator", " | "),
        ("--q_max_len", "9", "query_max_length", 9),
        ("--query-max-len", "9", "query_max_length", 9),
        ("--p_max_len", "11", "passage_max_length", 11),
        ("--passage_max_len", "11", "passage_max_length", 11),
    ],
)
@pytest.mark.parametrize("model", ["directory", "tiny"])
def test_settings_of_the_encoder(
    build: Callable[..., Built], flag: str, value: str, field: str, expected: object, model: str
) -> None:
    made = build(flag, value, **({"model": "tiny"} if model == "tiny" else {}))
    assert getattr(made.encoder.settings, field) == expected


def test_prefixes_lengths_and_separator_reach_the_tokens(build: Callable[..., Built]) -> None:
    made = build("--query_prefix", "ship: ", "--passage_prefix", "tide: ", "--p_max_len", "9")
    group = made.set[0]
    assert made.text(group.query, queries=True).startswith("ship")
    assert made.text(group.passages[0]).startswith("tide")
    assert len(group.passages[0]) == 9
    assert len(build("--q_max_len", "5").set[0].query) == 5
    spaced = build("--passage_field_separator", " ship ").set[0].passages[0]
    assert " ship " in made.text(spaced)


def test_pooling_changes_the_vectors(build: Callable[..., Built]) -> None:
    vectors = [build("--pooling", name).encoder(IDS, MASK) for name in ("cls", "mean", "max")]
    assert not torch.allclose(vectors[0], vectors[1])
    assert not torch.allclose(vectors[1], vectors[2])


def word_tokenizer(eos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2, "which": 3, "text": 4, "the": 5, "title": 6}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special
    )


def test_tokenizer_name(build: Callable[..., Built], tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path / "words")
    made = build("--tokenizer_name", tmp_path / "words")
    query = made.set[7].query.tolist()
    assert query == [1, 1, 1]  # words that it does not know
    assert collator_of(made.encoder)([made.set[7]])["query"]["input_ids"].tolist() == [query]
    save_encoder(tmp_path / "published", made.encoder)
    assert load_encoder(tmp_path / "published").tokenizer("which")["input_ids"] == [3]


def test_a_vocabulary_that_does_not_fit_is_refused(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    large = word_tokenizer()
    large.add_tokens([f"arg{number}" for number in range(200)])
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"token ids up to 206, .* embeds only") as caught:
        build("--tokenizer_name", tmp_path / "large")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="which has its own vocabulary"):
        build("--tokenizer_name", tmp_path / "large", model="tiny")


def test_cache_dir(build: Callable[..., Built], saved: Path, tmp_path: Path) -> None:
    """Models are found in the given hub cache only."""
    repository = tmp_path / "hub" / "models--sea--ships"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))
    made = build("--cache_dir", tmp_path / "hub", model="sea/ships")
    assert made.encoder.settings.pooling == "mean"
    with pytest.raises(UsageError, match="'sea/ships'"):
        build(model="sea/ships")


def test_untie_encoder_gives_queries_separate_weights(
    build: Callable[..., Built],
    make_trainer: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        made = build("--untie_encoder")
    assert "one encoder was loaded: queries and passages both start from its weights" in caplog.text
    encoder = made.encoder
    assert torch.equal(encoder.query_encoder(IDS, MASK), encoder(IDS, MASK))
    make_trainer(encoder, training_set=made.set, max_steps=1).train()
    encoder.eval()
    assert (encoder.query_encoder(IDS, MASK) - encoder(IDS, MASK)).abs().max() > 1e-4
    save_encoder(tmp_path / "two", encoder)
    assert (tmp_path / "two" / "query" / "model.safetensors").exists()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = build("--untie_encoder", model=tmp_path / "two").encoder
    assert "the encoders of queries and passages were loaded" in caplog.text
    for loaded, original in ((again, encoder), (again.query_encoder, encoder.query_encoder)):
        torch.testing.assert_close(loaded(IDS, MASK), original(IDS, MASK))
    assert build().encoder.untied_query_encoder is None


def test_add_pooler(build: Callable[..., Built], tmp_path: Path) -> None:
    made = build("--add_pooler", "--projection_out_dim", "7").encoder
    assert made.dimension == 7
    assert made.head[1].in_features == 16
    named = build("--add_pooler", "--projection_in_dim", "16", "--projection_out_dim", "7")
    assert named.encoder.dimension == 7
    save_encoder(tmp_path / "projected", made)
    loaded = load_encoder(tmp_path / "projected")
    torch.testing.assert_close(loaded(IDS, MASK), made(IDS, MASK))
    assert build("--projection_out_dim", "7").encoder.dimension == 16
    with pytest.raises(UsageError, match=r"takes 768 dimensions, .* gives 16"):
        build("--add_pooler", "--projection_in_dim", "768")
    assert build("--add_pooler").encoder.dimension == 768


def test_append_eos_token(build: Callable[..., Built], saved: Path, tmp_path: Path) -> None:
    """Training tokens, cut or complete, and the published encoder have the token."""
    encoder = load_encoder(saved)
    plain = Encoder(encoder.backbone, word_tokenizer(eos=True), encoder.settings)
    save_encoder(tmp_path / "plain", plain)
    made = build("--append_eos_token", "--p_max_len", "6", model=tmp_path / "plain")
    group = made.set[0]
    assert group.query.tolist()[-2:] == [1, 2]
    assert group.passages[0].tolist() == [6, 1, 1, 1, 1, 2]
    save_encoder(tmp_path / "published", made.encoder)
    again = build("--p_max_len", "6", model=tmp_path / "published")
    assert again.set[0].passages[0].tolist() == [6, 1, 1, 1, 1, 2]
    without = build("--p_max_len", "6", model=tmp_path / "plain").set[0]
    assert without.passages[0].tolist() == [6, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("model", ["directory", "tiny"])
def test_attn_implementation(build: Callable[..., Built], name: str, model: str) -> None:
    options = {"model": "tiny"} if model == "tiny" else {}
    made = build("--attn_implementation", name, "--untie_encoder", **options).encoder
    assert made.backbone.config._attn_implementation == name
    assert made.query_encoder.backbone.config._attn_implementation == name


def moved(encoder: Encoder) -> set[str]:
    return {name for name, weight in encoder.named_parameters() if weight.requires_grad}


def test_lora(build: Callable[..., Built]) -> None:
    flags = ("--lora", "--lora_r", "3", "--lora_alpha", "6", "--lora_dropout", "0.25")
    encoder = build(*flags, "--lora_target_modules", "query,value").encoder
    assert len(moved(encoder)) == 2 * 2 * 2
    assert all(".lora_" in name for name in moved(encoder))
    layer = next(module for module in encoder.modules() if hasattr(module, "lora_A"))
    assert layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].out_features == 3
    assert len(moved(build("--lora").encoder)) > 8
    assert not any(".lora_" in name for name in moved(build().encoder))


def test_lora_name_or_path_continues_adapters(
    build: Callable[..., Built], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag implies --lora; the path of a folder is written as an absolute path."""
    monkeypatch.chdir(saved.parent)
    first = build("--lora", "--lora_r", "3", "--lora_publish", "adapter", model="saved").encoder
    for name, weight in first.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    save_encoder(tmp_path / "adapter", first, merged=False)
    again = build("--lora_name_or_path", tmp_path / "adapter")
    assert again.request.model.lora
    torch.testing.assert_close(again.encoder.eval()(IDS, MASK), first.eval()(IDS, MASK))
    assert len(moved(again.encoder)) == len(moved(first))
    monkeypatch.chdir("/")
    loaded = load_encoder(tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS, MASK), first(IDS, MASK), rtol=1e-4, atol=1e-4)


def test_adapters_that_could_not_be_read_again_are_refused(
    build: Callable[..., Built], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the base of adapters of tiny is not saved"):
        build("--lora", "--lora_publish", "adapter", model="tiny")
    save_encoder(tmp_path / "two", build("--untie_encoder").encoder)
    with pytest.raises(UsageError, match="adapters have one base"):
        build("--lora", "--lora_publish", "adapter", model=tmp_path / "two")
    assert build("--lora", model=tmp_path / "two").encoder.untied_query_encoder is not None


def test_the_default_pooling_depends_on_the_collection(
    build: Callable[..., Built], saved: Path
) -> None:
    """A bare backbone has no pooling; recipes choose mean for collections with only judgements."""
    (saved / "mlflow_dr.json").unlink()
    (saved / "modules.json").unlink()
    assert build().encoder.settings.pooling == "mean"
    assert build("--pooling", "max").encoder.settings.pooling == "max"


def tables_in(cache: Path) -> int:
    return sum(path.is_dir() for path in (cache / "tokens").iterdir())


@pytest.mark.parametrize("store", [(), ("--document-store", "lookup")], ids=str)
def test_token_table_false_tokenises_late(
    build: Callable[..., Built], own_cache: Path, store: tuple[str, ...]
) -> None:
    late = build("--token_table", "false", *store).set
    assert isinstance(late._passages, LateTokens)
    assert tables_in(own_cache) == 1  # of the queries
    ahead = build().set
    assert tables_in(own_cache) == 2
    for index in range(len(ahead)):
        assert late[index].passages[0].tolist() == ahead[index].passages[0].tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--document_store", "lookup"], "lookup would not be read, .* add --token_table false"),
        (["--token_table", "false", "--document_store", "look"], "'look'; .*'lookup'.*known"),
        (["--token_table", "false", "--document_store", "tokens"], "by --token_table true"),
        (["--token_table", "false", "--document_store", "null"], "null: it holds no text"),
        (
            ["--token_table=false", "--document_store=lance", "--dataloader_num_workers=1"],
            "forked processes cannot read it; use --dataloader_num_workers 0",
        ),
    ],
)
def test_a_document_store_that_cannot_be_read_is_refused(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.training.checks.get_start_method", lambda **_: "fork")
    with pytest.raises(UsageError, match=message):
        parse_training(flags)


@pytest.mark.parametrize(("asked", "used"), [("1", []), ("2", [2, 2]), ("12", [3, 3])])
def test_dataset_proc_num(
    build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch, asked: str, used: list[int]
) -> None:
    """Of queries and passages; as threads here, and as processes in `test_token_table.py`."""
    pools: list[int] = []

    def pool(workers: int, _: object, *initializer: Any) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(workers, "", *initializer)

    monkeypatch.setattr(token_table, "TEXTS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(token_table, "usable_cores", lambda: 3)
    monkeypatch.setattr(token_table, "ProcessPoolExecutor", pool)
    _ = build("--dataset_proc_num", asked).set
    assert pools == used


@pytest.mark.parametrize("name", ["--train_n_passages", "--train-group-size"])
def test_train_n_passages(build: Callable[..., Built], scored: Path, name: str) -> None:
    group = build(name, "3", dataset=scored).set[0]
    assert len(group.passages) == 3
    assert group.scores is None


def test_train_dir_replaces_the_collections_examples(
    build: Callable[..., Built], scored: Path, folder: Path
) -> None:
    made = build("--train_dir", scored, "--train_n_passages", "2")
    assert len(made.set) == 6
    assert made.set[0].query_id == "s0"
    assert made.data.collection is not None
    assert made.data.collection.name == str(folder)


def test_distillation_reads_the_teachers_scores(
    build: Callable[..., Built], scored: Path, folder: Path
) -> None:
    made = build("--distil_weight", "0.5", "--train_n_passages", "3", dataset=scored).set
    for index in range(6):
        group = made[index]
        wanted = [float(row) for row in group.keys]  # rows are in the order of the numbers
        assert group.scores.tolist() == wanted
    with pytest.raises(DataError, match="lacks a teacher's scores"):
        build("--distil_weight", "0.5", "--train_n_passages", "1").set[0]


def test_seed(build: Callable[..., Built], scored: Path) -> None:
    def rows(seed: str) -> list[list[int]]:
        chosen = build("--seed", seed, "--train_n_passages", "3", dataset=scored).set
        return [chosen[index].keys.tolist() for index in range(6)]

    assert rows("1") == rows("1") != rows("2")


def test_a_mixture_by_weight(build: Callable[..., Built], folder: Path, scored: Path) -> None:
    """8 and 6 examples; shares by weight, by size without; no passage has another's key."""
    made = build("--train_n_passages", "1", dataset=f"{folder}@1+{scored}@3")
    chosen = made.set
    assert isinstance(chosen, Mixture)
    groups = [chosen[index] for index in range(14)]
    assert Counter(group.query_id[0] for group in groups) == {"q": 4, "s": 10}
    keys = {name: {int(g.keys[0]) for g in groups if g.query_id[0] == name} for name in "qs"}
    assert max(keys["q"]) < 10 <= min(keys["s"])
    assert made.data.collection is not None
    assert made.data.collection.name == str(folder)
    even = build("--train_n_passages", "1", dataset=f"{folder}+{scored}").set
    found = Counter(even[index].query_id[0] for index in range(14))
    assert found == {"q": 8, "s": 6}


def test_train_dir_and_a_mixture_contradict_each_other(
    build: Callable[..., Built], folder: Path, scored: Path
) -> None:
    with pytest.raises(UsageError, match="--train_dir replaces the examples of one collection"):
        build("--train_dir", scored, dataset=f"{folder}+{scored}")


def test_one_dataset_is_not_a_mixture(build: Callable[..., Built]) -> None:
    assert isinstance(build().set, TrainingSet)


def test_tiny_is_the_same_for_the_same_seed_and_texts(build: Callable[..., Built]) -> None:
    def made(seed: int) -> Encoder:
        torch.manual_seed(seed)
        return build(model="tiny").encoder.eval()

    first, second, third = made(0), made(0), made(1)
    assert torch.equal(first(IDS, MASK), second(IDS, MASK))
    assert not torch.equal(first(IDS, MASK), third(IDS, MASK))
    assert first.tokenizer("lighthouse")["input_ids"] == second.tokenizer("lighthouse")["input_ids"]
