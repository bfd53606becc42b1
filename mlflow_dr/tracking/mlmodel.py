"""The files by which MLflow knows a checkpoint as a model that it can load and serve.

MLmodel             the flavour `python_function`: module that loads it, inputs, outputs, params
requirements.txt    what has to be installed
python_env.yaml     the same for `--env-manager virtualenv` and `uv`
conda.yaml          the same for `--env-manager conda`

Format: https://mlflow.org/docs/latest/ml/model/. Written without ids and times, so that the same
encoder has the same files.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mlflow_dr.version import VERSION

MLMODEL = "MLmodel"
REQUIREMENTS = "requirements.txt"
PYTHON_ENV = "python_env.yaml"
CONDA_ENV = "conda.yaml"
FILES = frozenset((MLMODEL, REQUIREMENTS, PYTHON_ENV, CONDA_ENV))
LOADER = "mlflow_dr.pyfunc"
# beside our own package: what the vectors depend on
PACKAGES = ("mlflow", "torch", "transformers")
ANY_SIZE = -1
WIDTHS = ("embedding_dimension", "word_embedding_dimension")
SENTENCE = "sentence_embedding"


def write_mlmodel(directory: Path) -> None:
    """Describe an encoder's directory to MLflow, as a function from texts to vectors.

    Args:
        directory: as `save_encoder` or sentence-transformers wrote it; nothing that is there is
            changed but an earlier description.
    """
    python = platform.python_version()
    versions = _versions()
    requirements = [f"mlflow_dr=={VERSION}", *(f"{name}=={one}" for name, one in versions.items())]
    (directory / REQUIREMENTS).write_text("\n".join(requirements) + "\n", encoding="utf-8")
    env = {"python": python, "dependencies": [f"-r {REQUIREMENTS}"]}
    _write(directory / PYTHON_ENV, env)
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    _write(directory / CONDA_ENV, conda)
    flavor = {
        "loader_module": LOADER,
        "python_version": python,
        "env": {"conda": CONDA_ENV, "virtualenv": PYTHON_ENV},
    }
    model = {
        "flavors": {"python_function": flavor},
        "mlflow_version": versions["mlflow"],
        "signature": _signature(_vector_size(directory) or ANY_SIZE),
    }
    _write(directory / MLMODEL, model)


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
        places = sorted(directory.glob("*_Dense/config.json"), key=_position)
        dense = [values for values in map(_json, places) if _writes_vectors(values)]
        if dense:
            return int(dense[-1]["out_features"])
        values = _json(next(directory.glob("*_Pooling/config.json")))
        modes = values.get("pooling_mode")
        width = int(values[next(key for key in WIDTHS if key in values)])
        return width * (len(modes) if isinstance(modes, list) else 1)
    except (OSError, StopIteration, LookupError, TypeError, ValueError, AttributeError):
        return None
    except RecursionError:  # JSON of endless brackets
        return None


def _position(config: Path) -> int:
    """A module's place among the modules, by its folder: `2_Dense`."""
    return int(config.parent.name.partition("_")[0])


def _writes_vectors(dense: dict[str, Any]) -> bool:
    names = (dense.get("module_output_name"), dense.get("module_input_name"))
    return next((name for name in names if name), SENTENCE) == SENTENCE


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _versions() -> dict[str, str]:
    """Those of `PACKAGES`; without what names a build, such as 2.9.0+cpu, which no index has."""
    return {name: metadata.version(name).partition("+")[0] for name in PACKAGES}


def _write(path: Path, values: Any) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
