"""Where an encoder is read from: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from mlflow_dr.errors import UsageError

SOUGHT_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja", "*.py", "*_Dense/*.bin")
PICKLED_WEIGHTS = ("pytorch_model*.bin",)


def encoder_directory(name: str, cache_dir: str | None = None) -> Path:
    """The directory of an encoder; a hub name is downloaded, or found in the hub's cache.

    Weights come as safetensors; PyTorch's older `.bin` files are fetched only where a repository
    has no others (transformers reads them with `weights_only`, which runs no code).

    Args:
        name: a directory or a hub name.
        cache_dir: where files from the hub are kept; Hugging Face's own cache when None.

    Raises:
        UsageError: neither a directory nor a model that the hub or its cache has.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: not a directory; expected an encoder's directory or a hub name")
    return _from_hub(name, cache_dir)


def _from_hub(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = Path(
            snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(SOUGHT_FILES))
        )
        if not any(directory.glob("*.safetensors")):
            snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(PICKLED_WEIGHTS))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name!r} is no directory, and the Hugging Face hub gave no model of that name "
            f"({type(error).__name__}); check the name and the network, or name a directory"
        ) from error
    wanted = ("config.json", "adapter_config.json", "tokenizer_config.json", "modules.json")
    if not any((directory / file).exists() for file in wanted):
        raise UsageError(
            f"{name!r} is not wholly in the local hub cache and the hub cannot be reached; "
            "connect to the network, or name a directory"
        )
    return directory
