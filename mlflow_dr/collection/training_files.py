"""Training examples in a file or folder of the user's, in any of the known layouts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import CachedExamples, cached_examples
from mlflow_dr.collection.layouts import layout_of, raw_examples
from mlflow_dr.collection.passages import corpus_beside, corpus_of_file
from mlflow_dr.collection.recordfiles import SUFFIXES, check_complete, named_files, state_of
from mlflow_dr.collection.records import Topics
from mlflow_dr.errors import DataError, UsageError

log = logging.getLogger(__name__)

TRAIN = re.compile(r"(^|[._-])train", re.IGNORECASE)
OTHER = re.compile(
    r"(^|[._-])(corpus|psgs|queries|dev|valid|validation|val|test|eval)([._\d-]|$)", re.IGNORECASE
)


class TrainingFiles:
    """A collection that has training examples and nothing that is judged.

    The layout is recognised by the first record's fields: Tevatron's, with passages, with ids or
    tokenised, or DPR's. Ids are looked up in the file of passages beside the examples, else in the
    corpus that the caller gives.

    Args:
        path: a file, or a folder whose files are read in the order of their names.
        corpus: has the passages that ids name where no file beside the examples does.
        others: whether negatives that are not hard are read, too.
    """

    splits: Sequence[str] = ()

    def __init__(
        self, path: Path, corpus: Callable[[], Corpus] | None = None, others: bool = False
    ) -> None:
        self._path = path
        self._given = corpus
        self._others = others
        self.name = str(path)
        self.source = f"{'folder' if path.is_dir() else 'file'} {path}"

    def corpus(self) -> Corpus:
        """The passages that the examples' are rows of."""
        return self.examples().passages

    def topics(self, split: str) -> Topics:
        """Nothing is judged here.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} has training examples and no judged queries, so no split {split!r}"
        )

    def examples(self) -> CachedExamples:
        """The training examples.

        Raises:
            DataError: a malformed record, with file:line; no known layout; no usable record; or
                no corpus to look up ids in.
        """
        return self._examples

    def with_others(self) -> TrainingFiles:
        """The same files, read with negatives that are not hard."""
        return TrainingFiles(self._path, self._given, others=True)

    @cached_property
    def _examples(self) -> CachedExamples:
        files = training_files(self._path)
        layout = layout_of(files)
        if self._others:
            if layout.with_others is None:
                raise UsageError(
                    f"{self._path}: files in the layout {layout.name} have no negatives but hard "
                    "ones; leave out --other_negatives"
                )
            layout = layout._replace(name=f"{layout.name} others", example=layout.with_others)
        key = "\n".join([layout.name, *map(state_of, files)])
        corpus = self._corpus_of_ids() if layout.by_id else None
        return cached_examples(key, raw_examples(files, layout), str(self._path), corpus)

    def _corpus_of_ids(self) -> Corpus:
        folder = self._path if self._path.is_dir() else self._path.parent
        if beside := corpus_beside(folder):
            return corpus_of_file(beside)
        if self._given:
            return self._given()
        raise DataError(
            f"{self._path}: its records name passages by id, and {folder} has no corpus.jsonl "
            "(nor .gz, nor psgs*.tsv) to look them up in; put the passages there, or name the "
            "collection that has them"
        )


def training_files(path: Path) -> list[Path]:
    """The files of training examples: the path itself, or those of a folder, by name.

    In a folder these are the files with `train` at the start of a part of their name
    (`nq-train.json`), else all but those of passages, of queries and of other splits
    (`nq-dev.json`, `test.jsonl`).

    Raises:
        DataError: there are none.
    """
    if not path.is_dir():
        return [path]
    files = named_files(path)
    chosen = _chosen(files)
    check_complete(chosen)
    if not chosen:
        there = f"only {', '.join(file.name for file in files)}" if files else "none"
        raise DataError(
            f"{path}: expected files of training examples ({', '.join(SUFFIXES)}), there are "
            f"{there}; name the file itself to train on it"
        )
    names = ", ".join(file.name for file in chosen)
    log.info("%s: of %d files these are read: %s", path, len(files), names)
    return chosen


def has_training_files(folder: Path) -> bool:
    """Whether a folder has files that `training_files` would choose."""
    return bool(_chosen(named_files(folder, warn=False)))


def _chosen(files: Sequence[Path]) -> list[Path]:
    others = {file for file in files if OTHER.search(file.name)}
    train = [file for file in files if TRAIN.search(file.name)]
    plain = [file for file in train if file not in others]  # no `train_queries.jsonl`
    return plain or train or [file for file in files if file not in others]
