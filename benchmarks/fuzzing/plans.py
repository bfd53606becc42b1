"""Validations in a YAML file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.fuzzing import damage, odd, option_values
from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from benchmarks.fuzzing.collections import beir_folder

PLAN: dict[str, Any] = {
    "order": "bisect",
    "every": 2,
    "max_lag_seconds": 60,
    "max_seconds": 3600,
    "retry_failed": False,
    "follow": True,
    "poll_seconds": 1.5,
    "patience": 3,
    "min_delta": 0.01,
    "keep": "best:3,last:2",
    "metric": "dev/mrr_at_10",
    "validations": {
        "dev": {
            "dataset": "set",
            "split": "dev",
            "measures": "mrr@10 recall@100",
            "depth": 100,
            "dtype": "fp32",
        },
        "other": {
            "dataset": "irds:vaswani",
            "measures": ["ndcg@10", "map@5"],
            "device": "cpu",
            "keep_own_id": True,
        },
        "small": {"dataset": "set", "subset": "bm25@50+random:10", "seed": 3, "judged": "all"},
        "refined": {"subset": "random:5", "refine": "full@3"},
    },
}


def read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes().decode("utf-8-sig"))
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        RecursionError,
        AttributeError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        raise UnreadableError(f"not YAML ({type(error).__name__})") from error


def mapping(value: Any, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= allowed:
        raise UnreadableError("no mapping, or an unknown key")
    return value


def typed(
    values: dict[str, Any],
    key: str,
    kind: type,
    default: Any,
    least: float = -math.inf,
    open_: bool = False,
) -> Any:
    """A value of a type that is at least `least`."""
    if key not in values or (default is None and values[key] is None):
        return default
    value = values[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise UnreadableError(f"{key} is too large") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UnreadableError(f"{key} is no {kind.__name__}")
    if kind in (int, float) and (math.isnan(value) or value < least or (open_ and value == least)):
        raise UnreadableError(f"{key} is too small")
    return value


def only(values: dict[str, Any], key: str, default: str | None) -> Any:
    """A string, or the only one of a list."""
    value = values.get(key)
    if isinstance(value, list) and len(value) == 1:
        values = {key: value[0]}
    return typed(values, key, str, default)


def plan_right(path: Path) -> Any:
    """The plan as the independent reader reads it."""
    values = mapping(read_yaml(path), set(PLAN) | {"keep_up", "patience_seconds"})
    described = values.get("validations", {"val": {}})
    if not isinstance(described, dict) or not described:
        raise UnreadableError("no validations")
    if values.get("order", "oldest") not in ("oldest", "newest", "bisect"):
        raise UnreadableError("no such order")
    keep = typed(values, "keep", str, None)
    made = {
        "order": values.get("order", "oldest"),
        "every": typed(values, "every", int, 1, 1),
        "max_lag_seconds": typed(values, "max_lag_seconds", float, None, 0, True),
        "max_seconds": typed(values, "max_seconds", float, None, 0, True),
        "retry_failed": typed(values, "retry_failed", bool, False),
        "follow": typed(values, "follow", bool, True),
        "poll_seconds": typed(values, "poll_seconds", float, 2.0, 0, True),
        "patience": typed(values, "patience", int, None, 1),
        "min_delta": typed(values, "min_delta", float, 0.0, 0),
        "keep": None if keep is None else option_values.policy(keep),
        "metric": typed(values, "metric", str, None),
    }
    if not math.isfinite(made["min_delta"]):
        raise UnreadableError("min_delta is not finite")
    validations: dict[str, Any] = {}
    for name, given in described.items():
        for key, entry in validation(str(name), given).items():
            if key in validations:
                raise UnreadableError("two validations have the same name")
            validations[key] = entry
    return {**made, "validations": validations}


def validation(name: str, given: Any) -> dict[str, Any]:
    allowed = {
        "dataset",
        "split",
        "measures",
        "depth",
        "dtype",
        "device",
        "keep_own_id",
        "subset",
        "seed",
        "judged",
        "refine",
    }
    values = mapping(given or {}, allowed)
    text = values.get("measures", "mrr@10")
    if isinstance(text, list):
        if not all(isinstance(measure, str) for measure in text):
            raise UnreadableError("measures are no words")
        text = " ".join(text)
    measures = option_values.measures(str(text))
    depth = typed(values, "depth", int, None, 1)
    if depth is not None and depth < max(cut for _, cut in measures):
        raise UnreadableError("too shallow")
    seed, judged = typed(values, "seed", int, 0, 0), typed(values, "judged", str, "relevant")
    if judged not in ("relevant", "all"):
        raise UnreadableError("no such judged")
    dtype = typed(values, "dtype", str, "fp32")
    option_values.number_format(dtype)
    option_values.device(typed(values, "device", str, "auto"))
    settings = {
        "dataset": typed(values, "dataset", str, None),
        "split": only(values, "split", None),
        "measures": measures,
        "depth": depth,
        "dtype": option_values.FORMATS[dtype.strip().lower().removeprefix("torch.")],
        "device": values.get("device", "auto"),
        "keep_own_id": typed(values, "keep_own_id", bool, False),
        "refines": None,
    }
    spec = option_values.subset(only(values, "subset", "full"))
    made = {name: {**settings, **shown(spec, seed, judged)}}
    if "refine" in values:
        dear, _, count = typed(values, "refine", str, "").rpartition("@")
        more = option_values.subset(dear)
        if not count or more == spec:
            raise UnreadableError("refines nothing")
        made[f"{name}+"] = {
            **settings,
            **shown(more, seed, judged),
            "refines": option_values.whole(count),
        }
    return made


def shown(spec: list[Any], seed: int, judged: str) -> dict[str, Any]:
    kinds = {part[0] for part in spec}
    return {
        "subset": spec,
        "seed": seed if kinds & {"random", "queries"} else 0,
        "judged": "relevant" if "full" in kinds else judged,
    }


def plan_ours(path: Path) -> Any:
    from mlflow_dr.cli.options import from_flags
    from mlflow_dr.decisions.pruning import parse_keep_rules
    from mlflow_dr.validation.config import ValidateConfig

    plan = from_flags(ValidateConfig, {"measures": ("mrr@10",), "dtype": "fp32"}, path)
    validations = {}
    for validation in plan.all_validations:
        spec = validation.subset
        parts = sorted((term.name, term.count, term.arguments) for term in spec.terms)
        name = (
            validation.name.removesuffix(f"-{spec.slug}")
            if spec.slug and not validation.refines
            else validation.name
        )
        if validation.refines is not None:
            base = (
                key
                for key, cheap in validations.items()
                if cheap["_name"] == validation.refines.name
            )
            name = f"{next(base)}+"
        validations[name] = {
            "dataset": validation.dataset,
            "split": validation.split,
            "measures": [(m.name, m.cutoff) for m in validation.settings.measures],
            "depth": validation.settings.depth,
            "dtype": validation.settings.dtype,
            "device": validation.settings.device,
            "keep_own_id": validation.settings.keep_own_id,
            "refines": validation.refines and validation.refines.best,
            "subset": parts,
            "seed": spec.seed,
            "judged": spec.judged,
            "_name": validation.name,
        }
    for entry in validations.values():
        del entry["_name"]
    keep = parse_keep_rules(plan.keep) if plan.keep else None
    return {
        "order": plan.order,
        "every": plan.every,
        "max_lag_seconds": plan.max_lag_seconds,
        "max_seconds": plan.max_seconds,
        "retry_failed": plan.retry_failed,
        "follow": plan.follow,
        "poll_seconds": plan.poll_seconds,
        "patience": plan.patience,
        "min_delta": plan.min_delta,
        "keep": keep and {"best": keep.best, "last": keep.last, "every": keep.every},
        "metric": plan.metric,
        "validations": validations,
    }


def written(chance: Random, path: Path, values: Any) -> str:
    """Write a configuration with one change; returns a description of the change."""
    act = chance.randrange(4)
    if act:
        values, how = damage.tree(chance, values)
        if chance.random() < 0.3 and how.split(" ")[0].rpartition(".")[2] in (
            "measures",
            "subset",
            "keep",
            "refine",
            "dtype",
        ):
            how += " "
    else:
        how = ""
    try:
        text = (
            json.dumps(values)
            if chance.random() < 0.3
            else yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
        )
        path.write_bytes(text.encode("utf-8", "replace"))
    except (yaml.YAMLError, RecursionError):
        path.write_text(json.dumps(values))
    return how or damage.file(chance, path)


def plan(chance: Random, workdir: Path) -> Case:
    path = workdir / "plan.yaml"
    beir_folder(workdir / "set")
    values = PLAN
    if chance.random() < 0.3:
        name = chance.choice(("dev", "small", "refined"))
        key = {"dev": "measures", "small": "subset", "refined": "refine"}[name]
        text, how = odd.word(chance, PLAN["validations"][name][key])
        values = {
            **PLAN,
            "validations": {**PLAN["validations"], name: {**PLAN["validations"][name], key: text}},
        }
        path.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "replace"))
        how = f"{name}.{key} {how}: {text!r:.60}"
    else:
        how = written(chance, path, values)
    return Case(how, lambda: plan_ours(path), lambda: plan_right(path), ("plan.yaml",))


KINDS = [Kind("plan", plan, 7)]
