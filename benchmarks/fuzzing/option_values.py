"""Values of options: subsets, measures, number formats, keep rules, mixtures and devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import odd
from benchmarks.fuzzing.case import AnyOf, Case, Kind, UnreadableError
from mlflow_dr.collection.catalogue import parse_mixture
from mlflow_dr.decisions.pruning import parse_keep_rules
from mlflow_dr.devices import resolve_device, resolve_dtype
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset

FORMATS = {
    "auto": "auto",
    "fp32": "fp32",
    "float32": "fp32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
}
ALIASES = {"rr": "mrr", "r": "recall", "p": "precision", "ap": "map", "hit": "success"}
MEASURES = ("mrr", "ndcg", "recall", "map", "precision", "success", "accuracy")
NUMBERED = r"(?:random|queries):\d+|bm25@\d+"
NAMED = r"(?:ranking|encoder|rerank):.+?@\d+|pool:[^,]+?(?:,[^,]+?)*@\d+"
PART = re.compile(f"full|{NUMBERED}|{NAMED}", re.DOTALL)
JOINT = re.compile(r"\+(?=(?:full(?:\+|$)|bm25@|(?:random|ranking|pool|encoder|rerank|queries):))")


def whole(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"\d{1,18}", text) or int(text) == 0:
        raise UnreadableError("no whole number above 0")
    return int(text)


def subset(text: str) -> list[Any]:
    """Parts of a subset: kind, number, names; sorted."""
    text = text.strip()
    pieces = JOINT.split(text)
    made: list[Any] = []
    for piece in pieces:
        if not PART.fullmatch(piece):
            raise UnreadableError("no such strategy")
        kind = re.split("[:@]", piece)[0]
        names, _, _ = piece[len(kind) :].lstrip(":").rpartition("@" if "@" in piece else ":")
        count = 0 if kind == "full" else whole(re.split("[:@]", piece)[-1])
        listed = () if kind in ("full", "random", "queries", "bm25") else (names,)
        made.append((kind, count, tuple(names.split(",")) if kind == "pool" else listed))
    kinds = [part[0] for part in made]
    if len(set(made)) < len(made) or kinds.count("queries") > 1:
        raise UnreadableError("a term is repeated")
    if set(kinds) == {"queries"}:
        made.append(("full", 0, ()))
    passages = [kind for kind in kinds if kind != "queries"]
    if len(passages) > 1 and {"full", "rerank"} & set(passages):
        raise UnreadableError("a term that cannot be joined is joined")
    return sorted(made)


def measures(text: str) -> list[Any]:
    """Names and cut-offs without duplicates."""
    made: list[Any] = []
    for word in text.replace(",", " ").split():
        found = re.fullmatch(r"([a-z]+)(?:@|_at_)(\d+)", word.lower())
        if not found or ALIASES.get(found[1], found[1]) not in MEASURES or found[2].startswith("0"):
            raise UnreadableError("no measure")
        measure = (ALIASES.get(found[1], found[1]), whole(found[2]))
        made += [measure] if measure not in made else []
    if not made:
        raise UnreadableError("no measure")
    return made


def policy(text: str) -> dict[str, int]:
    """How many checkpoints each rule keeps; 0 if the rule is not given."""
    made: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        found = re.fullmatch(r"(best|last|every):(\d+)", word, re.ASCII)
        if not found or found[1] in made:
            raise UnreadableError("no rule")
        made[found[1]] = whole(found[2])
    if not made:
        raise UnreadableError("no rule")
    return {name: made.get(name, 0) for name in ("best", "last", "every")}


def mixture(text: str) -> list[Any]:
    """Names and weights."""
    made: list[Any] = []
    for part in text.split("+"):
        name, at, weight = part.strip().rpartition("@") if "@" in part else (part.strip(), "", "")
        if not name.strip():
            raise UnreadableError("a part without a name")
        if not at:
            made.append((name.strip(), None))
            continue
        try:
            number = float(weight)
        except ValueError as error:
            if re.fullmatch(r"[\w.-]+/[\w.-]+", name.strip(), re.ASCII) and weight.strip():
                made.append((part.strip(), None))  # a revision of a name on the hub
                continue
            raise UnreadableError("a weight is no number") from error
        if not 0 < number < math.inf:
            raise UnreadableError("a weight is no number above 0")
        made.append((name.strip(), number))
    return made


def number_format(text: str) -> Any:
    """A number format, by our name or by PyTorch's."""
    if text.strip().lower().removeprefix("torch.") not in FORMATS:
        raise UnreadableError("no format")
    made = FORMATS[text.strip().lower().removeprefix("torch.")]
    if made == "fp16":
        raise UnreadableError("fp16 on a processor")
    return AnyOf(("fp32", "bf16")) if made == "auto" else made


def _subset(text: str) -> Any:
    spec = parse_subset(text)
    _ = (spec.slug, spec.shown, str(spec), spec.is_full, spec.term_that_chooses("queries"))
    return sorted((term.name, term.count, term.arguments) for term in spec.terms)


def _policy(text: str) -> Any:
    made = parse_keep_rules(text)
    return {"best": made.best, "last": made.last, "every": made.every}


def _device(text: str) -> Any:
    return str(resolve_device(text))


def device(text: str) -> str:
    if text not in ("auto", "cpu") and not re.fullmatch(r"cpu:\d{1,3}", text, re.ASCII):
        raise UnreadableError("no device")
    return "cpu"


SORTS: list[tuple[str, Callable[[str], Any], Callable[[str], Any], tuple[str, ...]]] = [
    (
        "subset",
        _subset,
        subset,
        (
            "bm25@50+random:10000",
            "queries:200",
            "ranking:a.trec@10+bm25@5",
            "pool:a.trec,b.trec@7",
            "encoder:step-10@3+random:5",
            "rerank:x+y.trec@10+queries:3",
            "full",
        ),
    ),
    (
        "measure",
        lambda text: [(measure.name, measure.cutoff) for measure in parse_measures(text)],
        measures,
        ("mrr@10 ndcg@10 recall@100", "RR@10,R@5", "ndcg_at_10", "P@1 map@1000"),
    ),
    (
        "dtype",
        lambda text: resolve_dtype(text, resolve_device("cpu")),
        number_format,
        ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16"),
    ),
    ("keep", _policy, policy, ("best:3,last:2,every:10000", "last:1", "best:5 every:100")),
    (
        "mixture",
        lambda text: [tuple(part) for part in parse_mixture(text)],
        mixture,
        ("demo", "demo@2+msmarco@0.5", "a/b@1e3+c"),
    ),
    ("device", _device, device, ("cpu", "auto", "cuda", "cuda:0", "cpu:0")),
]


def strings(chance: Random, workdir: Path) -> Case:
    name, ours, right, sound = chance.choice(SORTS)
    text, how = odd.word(chance, chance.choice(sound))
    if chance.random() < 0.3:
        text, more = odd.word(chance, text)
        how += f", {more}"
    pieces = [piece[:8] for piece in re.split(r"[\s,+:@]+", text) if piece] or [name]
    names = (name, *pieces, repr(text)[1:12], "subset", "measure")
    return Case(f"{name} {how}: {text!r:.80}", lambda: ours(text), lambda: right(text), names)


KINDS = [Kind("words", strings, 9)]
