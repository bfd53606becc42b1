"""An encoder's files: the directory of a name, its base, whether it is complete, and its step."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from mlflow_dr.errors import CheckpointError, UnavailableError, UsageError, one_line, quoted
from mlflow_dr.hub import hub_is_away

# what is downloaded from the hub
PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja", "*.py", "*_Dense/*.bin")
PICKLED_WEIGHTS = ("pytorch_model*.bin",)

ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER_CONFIG, "modules.json", "mlflow_dr.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")

TRAINER_STATE = "trainer_state.json"
STEP_IN_NAME = re.compile(r"(?:.*[^0-9])?([0-9]{1,18})", re.DOTALL)
LARGEST_STEP = 10**18
"""MLflow stores a metric's step in 64 bits."""


def encoder_directory(name: str, cache_dir: str | None = None) -> Path:
    """The directory of an encoder; a hub name is downloaded, or found in the hub's cache.

    Weights are downloaded as safetensors. PyTorch's older `.bin` files are downloaded only if a
    repository has no others; transformers reads them with `weights_only`, which runs no code.

    Args:
        name: a directory or a hub name.
        cache_dir: the folder for files from the hub; Hugging Face's own cache when None.

    Raises:
        UsageError: neither a directory nor a model that the hub or its cache has.
    """
    if not name.strip():
        raise UsageError("the encoder's name is empty; expected a directory or a hub name")
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: not a directory; expected an encoder's directory or a hub name")
    return _from_hub(name, cache_dir)


def _from_hub(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    is_away = hub_is_away()

    def fetch(patterns: Collection[str]) -> Path:
        fetched = snapshot_download(
            name, cache_dir=cache_dir, allow_patterns=[*patterns], local_files_only=is_away
        )
        return Path(fetched)

    try:
        directory = fetch(PATTERNS)
        if not any(directory.glob("*.safetensors")):
            fetch(PICKLED_WEIGHTS)
    except (OSError, ValueError) as error:
        why = "cannot be reached, nor has its cache the model" if is_away else "has no such model"
        raise UsageError(
            f"{name!r} is not a directory, and the Hugging Face hub {why} "
            f"({type(error).__name__}); check the name and the network, or name a directory"
        ) from error
    if not any((directory / file).exists() for file in (*CONFIGS, "tokenizer_config.json")):
        raise UsageError(
            f"{name!r} is not complete in the local hub cache, and the hub cannot be reached; "
            "connect to the network, or name a directory"
        )
    return directory


def adapter_chain(directory: Path, cache_dir: str | None = None) -> list[Path]:
    """The directories of adapters that are based on one another, outermost first, then their base.

    Args:
        directory: with adapters, or the base itself.
        cache_dir: the folder for files from the hub; Hugging Face's own cache when None.

    Raises:
        UnavailableError: a base is not on this machine and cannot be downloaded.
        CheckpointError: a description is malformed, or adapters are based on themselves.
    """
    chain = [directory]
    while (path := chain[-1] / ADAPTER_CONFIG).exists():
        try:
            name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
            if not name:
                raise ValueError("base_model_name_or_path is empty")
            base = encoder_directory(name, cache_dir)
        except UsageError as error:
            raise UnavailableError(
                f"{chain[-1]} has adapters of another backbone: {error}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: does not name a backbone ({one_line(error)})"
            ) from error
        if any(base.resolve() == other.resolve() for other in chain):
            raise CheckpointError(
                f"{path}: base_model_name_or_path {quoted(name)} leads back to adapters that are "
                "based on it"
            )
        chain.append(base)
    return chain


def encoder_defect(directory: Path) -> str:
    """What is missing or damaged in an encoder's directory; an empty string if nothing is.

    Configurations must be JSON, the files that an index names must exist, and each safetensors file
    must have the length that its header gives. Files in modules' folders are checked, too.
    """
    try:
        configs = [directory / name for name in CONFIGS if (directory / name).is_file()]
        if not configs:
            return f"none of {', '.join(CONFIGS)}"
        for path in configs:
            json.loads(path.read_text(encoding="utf-8"))
        for index in (directory / name for name in INDEXES if (directory / name).is_file()):
            if reason := _index_defect(index):
                return f"{index.name} {reason}"
        weights = [path for pattern in WEIGHTS for path in sorted(directory.rglob(pattern))]
        if not weights:
            return "no weights"
        for path in weights:
            if reason := _weights_defect(path):
                return f"{path.relative_to(directory)} {reason}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} has gone"
    except (OSError, ValueError, RecursionError) as error:
        return one_line(error)
    return ""


def _weights_defect(path: Path) -> str:
    """What is wrong with a file of weights; an empty string if nothing is."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return "" if path.stat().st_size else "is empty"
    try:
        with safe_open(path, "np"):
            return ""
    except SafetensorError as error:
        return f"is damaged or cut off ({one_line(error)})"


def signature_of(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files, which change while a directory is being written."""
    signature = []
    for path in sorted(directory.rglob("*")):
        try:
            state = path.stat()
        except OSError:
            continue
        signature.append((str(path.relative_to(directory)), state.st_size, state.st_mtime_ns))
    return tuple(signature)


def step_of(directory: Path) -> int | None:
    """The training step of a checkpoint: from its trainer's notes, or the number its name ends in.

    None if neither gives a step.
    """
    try:
        noted = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        noted = None
    if type(noted) is int and 0 <= noted < LARGEST_STEP:
        return noted
    match = STEP_IN_NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def _index_defect(index: Path) -> str:
    """What is wrong with an index of weights; an empty string if nothing is."""
    values = json.loads(index.read_text(encoding="utf-8"))
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names:
        return "has no weight_map that names files"
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            return f"names {name!r:.100}, which is not a file in the same folder"
        if not index.with_name(name).is_file():
            return f"names {name}, which is missing"
    return ""
