import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.encoder.files import encoder_defect, signature_of, step_of
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder


@pytest.fixture
def directory(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Path:
    save_encoder(tmp_path / "checkpoint-10", make_tiny())
    return tmp_path / "checkpoint-10"


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


def test_a_complete_encoder(directory: Path) -> None:
    assert encoder_defect(directory) == ""


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda directory: (directory / "model.safetensors").unlink(), "no weights"),
        (lambda directory: cut(directory / "model.safetensors", -1), "is damaged or cut off"),
        (
            lambda directory: cut(directory / "model.safetensors", 30),
            "model.safetensors is damaged or cut off",
        ),
        (lambda directory: cut(directory / "model.safetensors", 4), "is damaged or cut off"),
        (lambda directory: (directory / "config.json").write_text('{"model_ty'), "Unterminated"),
        (
            lambda directory: [path.unlink() for path in directory.glob("*.json")],
            "none of config.json",
        ),
        (lambda directory: shutil.rmtree(directory), "none of config.json"),
    ],
)
def test_a_missing_or_damaged_file_is_named(
    directory: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(directory)
    assert says in encoder_defect(directory)


def test_shards_that_an_index_names_must_be_there(directory: Path) -> None:
    shard = directory / "model-00001-of-00002.safetensors"
    (directory / "model.safetensors").rename(shard)
    names = {"a": shard.name, "b": "model-00002-of-00002.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert encoder_defect(directory) == (
        f"{index.name} names model-00002-of-00002.safetensors, which is missing"
    )
    shutil.copy(shard, directory / "model-00002-of-00002.safetensors")
    assert encoder_defect(directory) == ""
    index.write_text('{"weight_map": {"a": "model')
    assert encoder_defect(directory)


def test_pickled_weights_and_those_of_modules_count(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert encoder_defect(directory) == "pytorch_model.bin is empty"
    (directory / "pytorch_model.bin").write_bytes(b"1")
    assert encoder_defect(directory) == ""


def test_the_signature_changes_while_a_directory_is_written(directory: Path) -> None:
    before = signature_of(directory)
    assert signature_of(directory) == before
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"1")
    assert signature_of(directory) != before


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("checkpoint-500", None, 500),
        ("checkpoint-500", '{"global_step": 12}', 12),
        ("checkpoint-500", '{"global', 500),
        ("checkpoint-500", '{"epoch": 1}', 500),
        ("step_20", None, 20),
        ("0007", None, 7),
        ("epoch2-step300", None, 300),
        ("runs", None, None),
        ("checkpoint-500-old", None, None),
        (f"checkpoint-{10**18}", None, None),
    ],
)
def test_the_step(tmp_path: Path, name: str, state: str | None, step: int | None) -> None:
    directory = tmp_path / name
    directory.mkdir()
    if state:
        (directory / "trainer_state.json").write_text(state)
    assert step_of(directory) == step


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[]",
        '{"weight_map": null}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "../b"}}',
    ],
)
def test_an_index_that_is_malformed(directory: Path, index: str) -> None:
    (directory / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in encoder_defect(directory)


@pytest.mark.parametrize(
    "header", [b"[]", b"7", b'{"a": 7}', b'{"a": {"data_offsets": 1}}', b'{"a": {}}', b"[" * 9999]
)
def test_a_malformed_header(directory: Path, header: bytes) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert encoder_defect(directory)


@pytest.mark.parametrize("noted", ["-1", "true", "1e3", "9" * 4000, "[" * 9999, '"5"'], ids=len)
def test_a_malformed_step_is_taken_from_the_name(directory: Path, noted: str) -> None:
    (directory / "trainer_state.json").write_text(f'{{"global_step": {noted}}}')
    assert step_of(directory) == 10


def test_a_name_that_ends_in_thousands_of_digits(tmp_path: Path) -> None:
    assert step_of(tmp_path / ("9" * 200)) is None
