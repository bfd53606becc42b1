"""Published checkpoints as MLflow loads them; they refer to these names, so the names must stay.

`MLmodel` names this module, and MLflow calls `_load_pyfunc`. `model.sentence_transformer` names
`ModuleAbove`. A checkpoint contains no pickled part of them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.devices import resolve_device
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError
from mlflow_dr.files import scratch
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.tracking.manifest import MANIFEST, link_listed_files, read_manifest, unlisted_files
from mlflow_dr.tracking.mlmodel import MODULES

QUERY, PASSAGE = "query", "passage"


class TextsToVectors:
    """An encoder with the interface of MLflow's models.

    Args:
        encoder: on its device, in evaluation mode.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._text_tokenizer = {
            QUERY: TextTokenizer.of(encoder.query_encoder),
            PASSAGE: TextTokenizer.of(encoder),
        }
        # a server calls it from several threads; a tokenizer's length limit is shared state, and so
        # is how the backbone computes while texts are encoded
        self._lock = threading.Lock()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Vectors of texts, the same as in a validation.

        Args:
            model_input: a data frame, whose first column is read, or a list of texts. A passage
                with a title is one text: title, separator, text.
            params: `prompt`, `query` (the default) or `passage`, says what the texts are, and
                which prompt, length and encoder are used.

        Returns:
            `(n_texts, dim) float32`.

        Raises:
            UsageError: another prompt, or a value that is not a text.
            CheckpointError: the encoder gives NaN or infinity.
        """
        kind = (params or {}).get("prompt", QUERY)
        if kind not in self._text_tokenizer:
            raise UsageError(f"prompt {kind!r}: expected {QUERY!r} or {PASSAGE!r}")
        texts = _texts(model_input)
        text_tokenizer = self._text_tokenizer[kind]
        with self._lock:
            if kind == QUERY:
                ids = text_tokenizer.query_ids([Query("", text) for text in texts])
            else:
                ids = text_tokenizer.passage_ids([Passage("", "", text) for text in texts])
            encoder = self._encoder.query_encoder if kind == QUERY else self._encoder
            vectors = encode_all(encoder, token_table(ids), text_tokenizer.pad_id, kind)
        return vectors.cpu().numpy()

    def get_raw_model(self) -> Encoder:
        """The encoder, for `mlflow.pyfunc.PyFuncModel.get_raw_model`."""
        return self._encoder


def _load_pyfunc(path: str) -> TextsToVectors:
    """Load a checkpoint's directory; `mlflow.pyfunc.load_model` calls this.

    Raises:
        CheckpointError: its files are damaged or missing.
    """
    with scratch() as folder:
        encoder = load_encoder(_listed_files(Path(path), folder), safetensors_only=True)
        return TextsToVectors(encoder.to(resolve_device()))


class ModuleAbove:
    """A module of sentence-transformers whose files are in the folder above.

    `mlflow.sentence_transformers.load_model` reads `model.sentence_transformer`, a folder inside a
    checkpoint. This class lets it find the weights without a second copy.
    """

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> Any:
        """The module itself, of the class that `modules.json` of the folder above names.

        Args:
            model_name_or_path: the folder `model.sentence_transformer`.
            subfolder: of the module, such as `1_Pooling`.
            options: the other arguments of the library.
        """
        checkpoint = Path(model_name_or_path).absolute().parent
        modules = json.loads((checkpoint / MODULES).read_text(encoding="utf-8"))
        kind = next(module["type"] for module in modules if module["path"] == subfolder)
        package, _, name = kind.rpartition(".")
        return getattr(import_module(package), name).load(
            str(checkpoint), subfolder=subfolder, **options
        )


def _listed_files(directory: Path, view: Path) -> Path:
    """The directory, or a view of the files in its manifest if the directory has others, too."""
    if not (directory / MANIFEST).is_file():
        return directory
    listed = read_manifest(directory, None)
    return (
        link_listed_files(directory, listed, view)
        if unlisted_files(directory, listed)
        else directory
    )


def _texts(model_input: Any) -> list[str]:
    """The texts of a data frame's first column, or of a list.

    Raises:
        UsageError: a value is not a text; its row is named.
    """
    if isinstance(model_input, str):
        return [model_input]
    column: Iterable[Any] = model_input
    if getattr(model_input, "ndim", 1) == 2:  # MLflow turns most inputs into a data frame
        column = model_input.iloc[:, 0]
    texts = list(column)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"text {number} is {text!r:.80}; expected a string in each row")
    return texts
