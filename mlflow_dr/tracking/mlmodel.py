"""The files by which MLflow knows a checkpoint as a model that it can load and serve.

MLmodel                        the flavours: `python_function` and, where sentence-transformers
                               reads the checkpoint, `sentence_transformers`
model.sentence_transformer/    what MLflow's `sentence_transformers` flavour loads: the settings of
                               the checkpoint, and modules that refer to the folder above
requirements.txt               what has to be installed
python_env.yaml                the same for `--env-manager virtualenv` and `uv`
conda.yaml                     the same for `--env-manager conda`

Format: https://mlflow.org/docs/latest/ml/model/. There are no ids and no times in them, so the same
encoder has the same files.
"""

from __future__ import annotations

import json
import platform
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mlflow_dr.version import VERSION

READER = "ExtractiveReader"
"""The architecture in the configuration of a reader, which is no encoder."""

MLMODEL = "MLmodel"
REQUIREMENTS = "requirements.txt"
PYTHON_ENV = "python_env.yaml"
CONDA_ENV = "conda.yaml"
FOLDER = "model.sentence_transformer"  # the only one that MLflow's flavour reads
FILES = frozenset((MLMODEL, REQUIREMENTS, PYTHON_ENV, CONDA_ENV))
LOADER = "mlflow_dr.pyfunc"
MODULE_ABOVE = f"{LOADER}.ModuleAbove"
MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
# the vectors depend on these, and on our own package
PACKAGES = ("mlflow", "sentence-transformers", "torch", "transformers")
ANY_SIZE = -1
WIDTHS = ("embedding_dimension", "word_embedding_dimension")
SENTENCE = "sentence_embedding"


def is_description(name: str) -> bool:
    """Whether a file of a checkpoint serves MLflow alone; encoders load without it."""
    return name in FILES or name.startswith(f"{FOLDER}/")


def write_mlmodel(directory: Path) -> None:
    """Describe an encoder's directory to MLflow, as a function from texts to vectors.

    A reader's directory is described as what it is, without a function that MLflow could call.

    Args:
        directory: as `save_encoder`, sentence-transformers or `save_reader` wrote it. Only an
            earlier description in it is changed.
    """
    python = platform.python_version()
    versions = _versions()
    requirements = [
        f"mlflow_dr=={VERSION}",
        *(f"{name}=={version}" for name, version in versions.items()),
    ]
    (directory / REQUIREMENTS).write_text("\n".join(requirements) + "\n", encoding="utf-8")
    env = {"python": python, "dependencies": [f"-r {REQUIREMENTS}"]}
    _write(directory / PYTHON_ENV, env)
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    _write(directory / CONDA_ENV, conda)
    if is_reader(directory):
        of_reader = {"mlflow_dr_reader": {"code": None}}
        values = {"flavors": of_reader, "mlflow_version": versions["mlflow"]}
        _write(directory / MLMODEL, values)
        return
    flavors: dict[str, dict[str, Any]] = {
        "python_function": {
            "loader_module": LOADER,
            "python_version": python,
            "env": {"conda": CONDA_ENV, "virtualenv": PYTHON_ENV},
        }
    }
    if _write_sentence_transformers_folder(directory):
        flavors["sentence_transformers"] = {
            "sentence_transformers_version": versions["sentence-transformers"],
            "code": None,
        }
    model = {
        "flavors": flavors,
        "mlflow_version": versions["mlflow"],
        "signature": _signature(_vector_size(directory) or ANY_SIZE),
    }
    _write(directory / MLMODEL, model)


def is_reader(directory: Path) -> bool:
    """Whether a directory is a reader's."""
    try:
        return READER in (_json(directory / "config.json").get("architectures") or ())
    except (OSError, TypeError, ValueError, AttributeError, RecursionError):
        return False


def _write_sentence_transformers_folder(directory: Path) -> bool:
    """Let `mlflow.sentence_transformers.load_model` find the modules in the folder above its own.

    Returns:
        Whether there is such a folder: the directory consists of that library's own modules.
    """
    folder = directory / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        modules = _json(directory / MODULES)
        if not all(module["type"].startswith("sentence_transformers.") for module in modules):
            return False
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return False
    folder.mkdir()
    above = [{**module, "type": MODULE_ABOVE} for module in modules]
    (folder / MODULES).write_text(json.dumps(above, indent=1) + "\n", encoding="utf-8")
    if (directory / SETTINGS).is_file():
        shutil.copyfile(directory / SETTINGS, folder / SETTINGS)
    return True


def _signature(size: int) -> dict[str, str]:
    """Texts, `(n_texts,)` strings -> vectors, `(n_texts, size) float32`; params: `prompt`."""
    tensor = {"dtype": "float32", "shape": [ANY_SIZE, size]}
    prompt = {"name": "prompt", "type": "string", "default": "query", "shape": None}
    return {
        # without a name, so that lists are taken and a column may be called anything
        "inputs": json.dumps([{"type": "string", "required": True}]),
        "outputs": json.dumps([{"type": "tensor", "tensor-spec": tensor}]),
        "params": json.dumps([prompt]),
    }


def _vector_size(directory: Path) -> int | None:
    """Dimensions of the vectors of an encoder; None where sentence-transformers' files do not say.

    Read without that library, which takes seconds to import.
    """
    try:
        configs = sorted(directory.glob("*_Dense/config.json"), key=_position)
        dense = [values for values in map(_json, configs) if _writes_vectors(values)]
        if dense:
            return int(dense[-1]["out_features"])
        values = _json(next(directory.glob("*_Pooling/config.json")))
        modes = values.get("pooling_mode")
        width = int(values[next(key for key in WIDTHS if key in values)])
        return width * (len(modes) if isinstance(modes, list) else 1)
    except (OSError, StopIteration, LookupError, TypeError, ValueError, AttributeError):
        return None
    except RecursionError:  # too many nested brackets
        return None


def _position(config: Path) -> int:
    """The position of a module among the modules, by the name of its folder: `2_Dense`."""
    return int(config.parent.name.partition("_")[0])


def _writes_vectors(dense: dict[str, Any]) -> bool:
    names = (dense.get("module_output_name"), dense.get("module_input_name"))
    return next((name for name in names if name), SENTENCE) == SENTENCE


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _versions() -> dict[str, str]:
    """Versions of `PACKAGES`, without a suffix such as `+cpu`, which no package index has."""
    return {name: metadata.version(name).partition("+")[0] for name in PACKAGES}


def _write(path: Path, values: Any) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
