"""JAX in the tests: programs are compiled once, and encoders are small."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if importlib.util.find_spec("jax") is None:  # the extra is not installed
    collect_ignore_glob = ["test_*.py"]
else:
    import jax

DEVICES = 4


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one test has compiled, the next one takes from files."""
    directory = str(tmp_path_factory.mktemp("jax"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield


@pytest.fixture
def in_fp64() -> Iterator[None]:
    """JAX computes in fp64 where it is given fp64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def make_backbone(make_tiny: Callable[..., Any]) -> Callable[..., Any]:
    """A function from transformers' name of a kind to an encoder with one layer of few weights."""

    def make(kind: str, seed: int = 0, **settings: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModel

        from mlflow_dr.encoder.backbone import has_unused_pooler
        from mlflow_dr.encoder.model import Encoder

        tiny = make_tiny(**{"pooling": "mean", **settings})
        names = ("dim", "n_layers", "n_heads", "hidden_dim", "dropout", "attention_dropout")
        if kind != "distilbert":
            names = (
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                *("hidden_dropout_prob", "attention_probs_dropout_prob"),
            )
        sizes = dict(zip(names, (16, 1, 2, 32, 0.0, 0.0), strict=True))
        config = AutoConfig.for_model(
            kind,
            vocab_size=len(tiny.tokenizer),
            max_position_embeddings=160,
            pad_token_id=tiny.tokenizer.pad_token_id,
            initializer_range=0.3,
            **sizes,
        )
        options = {"add_pooling_layer": False} if has_unused_pooler(config) else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = AutoModel.from_config(config, **options)
            return Encoder(backbone, tiny.tokenizer, tiny.settings).eval()

    return make
