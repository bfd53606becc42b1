"""Suites: several collections under one name, validated each by itself and by their mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_dr.collection.locations import hub_name
from mlflow_dr.config import read_mapping
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.files import is_path

JOIN = "+"
NANOBEIR = re.compile(r"nanobeir(-[a-z]{2,3})?")
NANOBEIR_REPO = re.compile(r"[^/]+/NanoBEIR-[a-z]{2,3}")
ENGLISH, TRANSLATED = "sentence-transformers/NanoBEIR-en", "lightonai/NanoBEIR"
NANOBEIR_NAMES = (
    *("ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ"),
    *("QuoraRetrieval", "SCIDOCS", "ArguAna", "SciFact", "Touche2020"),
)
NOT_IN_NAME = re.compile(r"[^\w\-]+")


class Member(NamedTuple):
    """A collection of a suite.

    Attributes:
        name: what is added to the name of the validation.
        settings: of its validation, as in a file of validations; `dataset` is one of them.
    """

    name: str
    settings: Mapping[str, Any]


def suite_members(text: str | None) -> list[Member]:
    """The collections of a suite; empty for the name of anything else.

    A suite is `nanobeir`, `nanobeir-LANGUAGE`, or a repository such as `OWNER/NanoBEIR-LANGUAGE`; a
    YAML file whose keys are names and whose values are collections, or settings with a `dataset`;
    or several of these and of collections, joined by `+`.

    Raises:
        UsageError: the file cannot be read or has no collections, or two have one name.
    """
    if text is None:
        return []
    members = list(_members(text))
    names = [member.name for member in members]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            f"{text}: two collections are called {repeated[0]!r}; name them in a YAML file"
        )
    return members


def _members(text: str) -> Iterator[Member]:
    if is_path(text):
        if text.endswith((".yaml", ".yml")) and Path(text).is_file():
            yield from _file_members(Path(text).expanduser())
        return
    if repository := _nanobeir_repository(text):
        repo, at, revision = repository.partition("@")
        for name in NANOBEIR_NAMES:
            # NanoBEIR's own evaluator keeps such passages
            settings = {"dataset": f"{repo}/Nano{name}{at}{revision}", "keep_own_id": True}
            yield Member(f"Nano{name}", settings)
        return
    if JOIN not in text:
        return
    for part in (part.strip() for part in text.split(JOIN)):
        if not part:
            raise UsageError(f"dataset {text!r}: a part without a name; a suite is NAME+NAME")
        yield from list(_members(part)) or [Member(short_name(part), {"dataset": part})]


def _nanobeir_repository(text: str) -> str:
    """The repository of a NanoBEIR, with its revision; empty for the name of anything else."""
    if match := NANOBEIR.fullmatch(text):
        return TRANSLATED + match[1] if match[1] not in (None, "-en") else ENGLISH
    name = hub_name(text)
    if name is None or name.config or name.split or not NANOBEIR_REPO.fullmatch(name.repo):
        return ""
    return text


def _file_members(path: Path) -> Iterator[Member]:
    values = read_mapping(path)
    if not values:
        raise UsageError(f"{path}: no collections; expected names, each with a dataset")
    for name, value in values.items():
        settings = {"dataset": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or not isinstance(settings.get("dataset"), str):
            raise UsageError(
                f"{path}: {name} is {quoted(value)}; expected a dataset, or settings with a dataset"
            )
        if list(_members(settings["dataset"])):
            raise UsageError(f"{path}: {name}: {settings['dataset']} is a suite; name collections")
        yield Member(name, {str(key): setting for key, setting in settings.items()})


def short_name(dataset: str) -> str:
    """The last part of a collection's name, without revision, split and suffix; also in a join."""
    if JOIN in dataset and not is_path(dataset):
        return JOIN.join(short_name(part.strip()) for part in dataset.split(JOIN))
    if name := hub_name(dataset):
        return name.config or name.repo.partition("/")[2]
    prefix, colon, location = dataset.partition(":")
    name_of_path = Path(location or prefix).expanduser().absolute().name
    return NOT_IN_NAME.sub("_", location if prefix == "irds" and colon else name_of_path)
