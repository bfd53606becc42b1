"""A validator's plan from a YAML file: `mlflow-dr validate --config validations.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mlflow_dr.collection.asyncval import given_collection
from mlflow_dr.collection.catalogue import ENTRIES, HUB_NAME, open_collection
from mlflow_dr.collection.formats import check_split
from mlflow_dr.decisions.pruning import parse_keep_rules
from mlflow_dr.engines.devices import resolve_device, resolve_dtype
from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.terminal import one_line_of
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.plan import Asked, Plan, Validation
from mlflow_dr.validation.policies import Wishes

COLLECTION = ("dataset", "candidates", "queries", "qrels")
LARGEST = 10**15  # of seconds and the like
SUBSET = ("subset", "seed", "judged", "refine")


def read_plan(path: Path, asked: Asked, **others: Any) -> Plan:
    """A plan from a YAML file; what the file does not say is as it was given.

        order: bisect
        validations:
          dev: {dataset: msmarco, split: dev, measures: mrr@10 recall@1000}
          covid: {dataset: irds:beir/trec-covid, measures: ndcg@10}
          msmarco: {dataset: msmarco, subset: bm25@50+random:10000, refine: full@3}
          nq: {candidates: nq/corpus, queries: nq/test.json, qrels: nq/qrels.tsv}

    The last one names files as Asyncval takes them. It may have several query files, each of which
    is a validation of its own, called NAME-FILE.

    Args:
        path: the file.
        asked: what each validation is made of where the file says nothing.
        others: likewise, attributes of the plan.

    Raises:
        UsageError: no such file, or a key or value that has no place in it.
    """
    values = _read(path)
    known = {one.name for one in fields(Plan)} - {"encoder_changes", "wishes"}
    values = _mapping(values, str(path), known | {one.name for one in fields(Wishes)})
    described = values.pop("validations", None)
    if not isinstance(described, dict) or not described:
        raise UsageError(f"{path}: expected `validations:` with a name for each")
    if "order" in values:
        values["order"] = _order(values["order"], f"{path}: order")
    kinds = {"every": int, "retry_failed": bool, "follow": bool, "keep_up": bool}
    kinds |= dict.fromkeys(("max_lag_seconds", "poll_seconds", "patience_seconds"), float)
    for key, kind in kinds.items():
        if key in values:
            values[key] = _value(values[key], kind, f"{path}: {key}")
    wishes = {one.name: values.pop(one.name) for one in fields(Wishes) if one.name in values}
    validations = tuple(
        validation
        for name, value in described.items()
        for validation in _validations(str(name), value, asked, f"{path}: validations.{name}")
    )
    with _at(str(path)):
        wished = replace(others.pop("wishes", Wishes()), **_wishes(wishes, str(path)))
        return Plan(validations, wishes=wished, **{**others, **values})


def _read(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        UsageError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a YAML file: not UTF-8 text ({error.reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a YAML file: {one_line_of(str(error), 200)}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which one key stands once; of two the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {repeated[0]!r} stands twice in the mapping of line {line}")
        return super().construct_mapping(node, deep)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say of a value that is refused which file and key it comes from, unless that is said."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        raise UsageError(text if text.startswith(where) else f"{where}: {text}") from error


def _wishes(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    kinds: dict[str, type] = {"metric": str, "patience": int, "min_delta": float, "keep": str}
    checked = {key: _value(value, kinds[key], f"{where}: {key}") for key, value in values.items()}
    if "keep" in checked:
        with _at(f"{where}: keep"):
            checked["keep"] = parse_keep_rules(checked["keep"])
    return checked


def _validations(name: str, given: Any, asked: Asked, where: str) -> tuple[Validation, ...]:
    known = {*COLLECTION, "split", *SUBSET, *(one.name for one in fields(Settings))}
    values = _mapping(given or {}, where, known)
    named: dict[str, str] = {
        key: _value(values.pop(key), str, f"{where}.{key}")
        for key in ("dataset", "split")
        if key in values
    }
    files = [_paths(values.pop(key, []), f"{where}.{key}") for key in COLLECTION[1:]]
    with _at(where):
        dataset, sets = given_collection(named.get("dataset"), files, COLLECTION, f"{where}: ")
    _check_data(named, where)
    if dataset is not None:
        asked = replace(asked, dataset=dataset, sets=sets, splits=() if sets else asked.splits)
    if "split" in named:
        asked = replace(asked, splits=[named["split"]])
    subset: dict[str, Any] = {
        key: _value(values.pop(key), int if key == "seed" else str, f"{where}.{key}")
        for key in SUBSET
        if key in values
    }
    if "measures" in values:
        text = values["measures"]
        with _at(f"{where}.measures"):
            joined = " ".join(map(str, text)) if isinstance(text, list) else str(text)
            values["measures"] = parse_measures(joined)
    for key, kind in {"depth": int, "device": str, "dtype": str, "keep_own_id": bool}.items():
        if key in values:
            values[key] = _value(values[key], kind, f"{where}.{key}")
    if "subset" in subset:
        subset["subsets"] = [subset.pop("subset")]
        with _at(f"{where}.subset"):
            parse_subset(subset["subsets"][0])
    if subset.get("refine") == "":
        raise UsageError(f"{where}.refine is empty; expected SUBSET@N, such as full@3")
    settings = replace(asked.settings, **values)
    with _at(f"{where}.device"):
        device = resolve_device(settings.device)
    with _at(f"{where}.dtype"):
        resolve_dtype(settings.dtype, device)
    with _at(where):
        return replace(asked, settings=settings, **subset).validations(name)


def _check_data(named: Mapping[str, str], where: str) -> None:
    """Refuse a dataset, or a split of it, that is not there; nothing is fetched or made for it."""
    dataset = named.get("dataset")
    known = {entry.name for entry in ENTRIES}
    if dataset is None or dataset in known:
        return
    if HUB_NAME.fullmatch(dataset) and not Path(dataset).exists():
        return
    with _at(f"{where}.dataset"):
        collection = open_collection(dataset)
    if "split" in named:
        with _at(f"{where}.split"):
            check_split(collection, named["split"])


def _paths(value: Any, where: str) -> list[Path]:
    """One path or several."""
    values = value if isinstance(value, list) else [value]
    return [Path(_value(one, str, where)) for one in values]


def _mapping(given: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: expected keys with values, such as {', '.join(sorted(known))}")
    if unknown := sorted(map(str, set(given) - known)):
        near = did_you_mean(unknown[0], known) or ";"
        raise UsageError(
            f"{where}: no key {quoted(unknown[0])}{near} known are {', '.join(sorted(known))}"
        )
    return dict(given)


def _order(value: Any, where: str) -> Order:
    try:
        return Order(value if isinstance(value, str) else "")
    except ValueError:
        names = ", ".join(order.value for order in Order)
        raise UsageError(f"{where} is {quoted(value)}; expected one of {names}") from None


def _value(value: Any, kind: type, where: str) -> Any:
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        right = abs(value) <= LARGEST  # false of NaN, too
    if not right:
        raise UsageError(
            f"{where} is {quoted(value)}; expected a value of type {kind.__name__}"
            + (" (true or false, without quotation marks)" if kind is bool else "")
        )
    return float(value) if kind is float else value
