"""Private names of other libraries are still there; a failure names the upgrade that broke it."""

import argparse
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from mlflow_dr import compat


def upgraded(library: str, name: str) -> str:
    """The message of a failing test."""
    return f"{library} {version(library)} has changed `{name}`; see mlflow_dr/compat.py"


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, mlflow_dr.compat; print(sorted({'torch', 'mlflow'} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    ).stdout
    assert shown.strip() == "[]"


def test_python_calls_functions_before_thread_pools_end() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from mlflow_dr.compat import register_before_thread_pools_end as register\n"
        "register(lambda: print(ThreadPoolExecutor().submit(int, '7').result()))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600
    )
    changed = f"Python {sys.version} has changed `threading._register_atexit`"
    assert ended.stdout == "7\n", f"{changed}; see mlflow_dr/compat.py: {ended.stderr}"


def test_argparse_has_the_actions_of_a_parser() -> None:
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--one", "--two")
    changed = f"Python {sys.version} has changed `ArgumentParser._option_string_actions`"
    actions = compat.flag_actions(parser)
    assert actions["--one"] is actions["--two"] is action, changed


@pytest.mark.parametrize("name", compat.TRAINER_OVERRIDES)
def test_trainer_has_the_methods_that_ours_overrides(name: str) -> None:
    from transformers import Trainer

    from mlflow_dr.training.trainer import RetrieverTrainer

    method = getattr(Trainer, name, None)
    assert method is not None, upgraded("transformers", f"Trainer.{name}")
    expected = compat.TRAINER_OVERRIDES[name]
    parameters = tuple(inspect.signature(method).parameters)[1:]
    assert parameters[: len(expected)] == expected, upgraded("transformers", f"Trainer.{name}")
    assert name in vars(RetrieverTrainer), f"{name} is not overridden any more; remove it there"


def test_trainer_takes_batches_by_the_public_method_that_ours_overrides() -> None:
    from transformers import Trainer

    name = "Trainer.get_batch_samples"
    parameters = tuple(inspect.signature(Trainer.get_batch_samples).parameters)[1:]
    assert parameters == ("epoch_iterator", "num_batches", "device"), upgraded("transformers", name)
    assert "get_batch_samples(" in inspect.getsource(Trainer._run_epoch), name


def test_accelerates_loader_leaves_batches_where_they_are_without_a_device() -> None:
    from accelerate.data_loader import DataLoaderShard

    loader = DataLoaderShard([torch.ones(1)] * 2, device="meta")
    assert next(iter(loader)).device.type == "meta"
    loader.device = None
    assert next(iter(loader)).device.type == "cpu", upgraded("accelerate", "DataLoaderShard.device")


def test_the_overrides_are_all_listed() -> None:
    from transformers import Trainer

    from mlflow_dr.training.trainer import RetrieverTrainer

    private = {name for name in vars(RetrieverTrainer) if name.startswith("_") and name[1] != "_"}
    assert private & set(dir(Trainer)) == set(compat.TRAINER_OVERRIDES)


def test_trainer_has_the_attributes_of_its_summed_losses() -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen: list[tuple[object, float, int]] = []

    class Sums(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            compat.set_loss_progress(trainer, 8.0, 4.0, 0)

        def on_step_end(self, *_: object, **__: object) -> None:
            loss, total, logged = compat.loss_progress(trainer)
            seen.append((float(loss), total, logged))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.weight * 0 + 2.0}

    arguments = TrainingArguments(
        max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = [{"x": 1.0}]
    trainer = Trainer(Constant(), arguments, train_dataset=rows, callbacks=[Sums()])  # type: ignore[arg-type]
    trainer.train()
    assert seen == [(10.0, 4.0, 0)], upgraded("transformers", "Trainer._tr_loss")


def test_training_arguments_take_the_number_of_gpus() -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(use_cpu=True)
    assert arguments.n_gpu == 0
    compat.use_devices(arguments, 3)
    assert arguments.n_gpu == 3, upgraded("transformers", "TrainingArguments._n_gpu")


def test_a_compiled_module_has_the_original_inside() -> None:
    module = nn.Linear(2, 2)
    compiled = torch.compile(module)
    assert compat.uncompiled(compiled) is module, upgraded("torch", "OptimizedModule._orig_mod")
    assert compat.uncompiled(module) is module


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_transformers_and_of_peft_are_seen() -> None:
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    def backbone() -> BertModel:
        return BertModel(
            BertConfig(
                vocab_size=8,
                hidden_size=4,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=4,
            )
        )

    assert not compat.has_adapters(backbone())
    configuration = peft.LoraConfig(target_modules=["query"])
    assert compat.has_adapters(peft.get_peft_model(backbone(), configuration)), upgraded(
        "peft", "PeftModel.merge_and_unload"
    )
    injected = backbone()
    injected.add_adapter(configuration)
    assert compat.has_adapters(injected), upgraded("transformers", "_hf_peft_config_loaded")


def test_sharded_weights_are_seen() -> None:
    from torch.distributed.tensor import DTensor

    assert hasattr(DTensor, "full_tensor"), upgraded("torch", "DTensor.full_tensor")
    assert not compat.is_sharded(torch.zeros(1))


def test_torch_says_whether_the_processor_has_bf16() -> None:
    try:
        found = compat.processor_instructions_for_bf16()
    except AttributeError as error:
        pytest.fail(f"{upgraded('torch', 'torch.cpu._is_...')} ({error})")
    assert [type(has) for has in found] == [bool, bool]


def test_torch_says_whether_the_processor_has_avx512() -> None:
    assert type(compat.processor_has_avx512()) is bool, upgraded("torch", "_is_avx512_supported")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("has_gelu", [True, False])
@torch.inference_mode()
def test_torch_computes_linear_layers_by_onednn(has_gelu: bool) -> None:
    layer, inputs = torch.nn.Linear(16, 8), torch.randn(5, 16)
    try:
        found = compat.onednn_linear(layer, 5, has_gelu=has_gelu)(inputs)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.fail(f"{upgraded('torch', 'torch.ops.mkldnn._linear_pointwise')} ({error})")
    expected = layer(inputs)
    torch.testing.assert_close(found, torch.nn.functional.gelu(expected) if has_gelu else expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 1, 3), (5, 70, 32)])
@torch.inference_mode()
def test_torch_computes_dot_products_by_onednn(shape: tuple[int, int, int]) -> None:
    n, m, dim = shape
    left, right = torch.randn(n, dim), torch.randn(m, 2 * dim)[:, ::2]
    found = compat.onednn_product(left, right)
    torch.testing.assert_close(found, left @ right.T, msg=upgraded("torch", "_linear_pointwise"))


@pytest.mark.parametrize("name", compat.MLFLOW_OVERRIDES)
def test_mlflows_base_client_has_the_methods_that_ours_overrides(name: str) -> None:
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    assert hasattr(TrackingServiceClient, name), upgraded("mlflow", f"TrackingServiceClient.{name}")


def test_mlflows_base_client_can_be_replaced_and_finds_the_artifact_store(
    client: MlflowClient, tmp_path: Path
) -> None:
    changed = upgraded("mlflow", "MlflowClient._tracking_client")
    run = client.create_run(client.create_experiment("compat", str(tmp_path / "files")))
    before = compat.service_client(client)
    compat.set_service_client(client, before)
    assert compat.service_client(client) is before, changed
    assert client.get_run(run.info.run_id).info.run_id == run.info.run_id, changed
    client.log_text(run.info.run_id, "seven", "one.txt")
    store = compat.artifact_store(client, run.info.run_id)
    assert [file.path for file in store.list_artifacts()] == ["one.txt"]
    compat.download_file(store, "one.txt", str(tmp_path / "fetched"))
    changed = upgraded("mlflow", "ArtifactRepository._download_file")
    assert (tmp_path / "fetched").read_text() == "seven", changed


def test_mlflows_datasets_become_entities() -> None:
    import numpy
    from mlflow.data.numpy_dataset import from_numpy

    entity = compat.dataset_entity(from_numpy(numpy.zeros(1), name="zeros"))
    assert entity.name == "zeros", upgraded("mlflow", "Dataset._to_mlflow_entity")


@pytest.mark.parametrize("name", compat.SENTENCE_TRANSFORMERS_OVERRIDES)
def test_transformer_modules_have_the_methods_that_ours_overrides(name: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Transformer

    changed = upgraded("sentence-transformers", f"Transformer.{name}")
    expected = compat.SENTENCE_TRANSFORMERS_OVERRIDES[name]
    parameters = tuple(inspect.signature(getattr(Transformer, name)).parameters)[1:]
    assert parameters[: len(expected)] == expected, changed


def test_sentence_transformers_loads_with_other_classes_and_names_routes() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Router

    for kind, name in (
        (SentenceTransformer, "_load_with_module_classes"),
        (Router, "_resolve_route"),
    ):
        assert hasattr(kind, name), upgraded("sentence-transformers", f"{kind.__name__}.{name}")


@pytest.mark.parametrize("name", compat.ATTENTIONS)
def test_a_class_of_models_says_which_attention_it_can_use(name: str) -> None:
    from transformers import PreTrainedModel

    assert getattr(PreTrainedModel, name, None) is False, upgraded("transformers", name)


@pytest.mark.parametrize("has_ended", [True, False])
def test_torch_ends_the_use_of_a_memory_pool(
    has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: a graph whose capture has ended does it by itself."""

    class Graph:
        def capture_end(self) -> None:
            raise RuntimeError("previous error during capture")

        def pool(self) -> tuple[int, int]:
            if not has_ended:
                raise RuntimeError("called without a preceding successful capture")
            return 0, 1

    ended: list[tuple[str, int, tuple[int, int]]] = []
    for name in compat.ABANDONED_POOL:
        assert hasattr(torch.cuda.memory, name), upgraded("torch", name)
        monkeypatch.setattr(
            torch.cuda.memory, name, lambda *given, name=name: ended.append((name, *given))
        )
    compat.abandon_capture(Graph(), torch.device("cuda:1"), (0, 1))
    expected = [] if has_ended else [(name, 1, (0, 1)) for name in compat.ABANDONED_POOL]
    assert ended == expected


def test_mlflow_makes_up_names_of_runs_from_its_lists() -> None:
    from mlflow.utils import name_utils

    made_up = name_utils._generate_random_name()
    assert compat.is_generated_name(name_utils, made_up), upgraded("mlflow", "name_utils")
    for chosen in ("sea-tiny-1129-0741", "first", "my-bert-2", ""):
        assert not compat.is_generated_name(name_utils, chosen)


def test_transformers_takes_an_attention_of_ours() -> None:
    from transformers import BertConfig, BertModel

    def ours(*given: object, **_: object) -> tuple[torch.Tensor, None]:
        called.append(given[4])
        return torch.zeros(1, 5, 2, 4), None

    called: list[object] = []
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, **sizes), add_pooling_layer=False)
    compat.register_attention("test_of_ours", ours)
    before = model.config._attn_implementation
    with compat.attention_set(model.config, "test_of_ours"):
        model(torch.zeros(1, 5, dtype=torch.int64))
    # once, without a mask
    assert called == [None], upgraded("transformers", "_attn_implementation, AttentionInterface")
    assert model.config._attn_implementation == before
