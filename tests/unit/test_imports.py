"""The rooms import one way, and each heavy library has one room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlflow_dr

PACKAGE = Path(mlflow_dr.__file__).parent

# a room may import from those on lower floors and from its own
FLOORS = {
    "cli": 10,
    "qa": 9,
    "launch": 8,
    "doctor": 8,
    "api": 9,
    "fidelity_study": 8,
    "loaders": 8,
    "jax_engine": 8,
    "training": 7,
    "validation": 7,
    "mining": 7,
    "vectors": 7,
    "reader": 7,
    "pyfunc": 7,
    "ray": 8,
    "report": 6,
    "fields": 6,
    "subsets": 5,
    "decisions": 5,
    "tracking": 4,
    "retrieval": 4,
    "engines": 4,
    "encoder": 3,
    "stores": 2,
    "collection": 1,
    "config": 0,
    "background": 0,
    "progress": 0,
    "cache": 0,
    "cache_entries": 1,
    "devices": 1,
    "compat": 0,
    "extensions": 0,
    "files": 0,
    "hub": 0,
    "mapped_file": 0,
    "errors": 0,
    "process_tree": 0,
    "terminal": 0,
    "pages": 0,
    "time_limit": 0,
    "version": 0,
}
# siblings on one floor that may look at each other, one way
ALLOWED_BESIDE = {
    ("retrieval", "engines"),
    ("files", "errors"),
    ("hub", "background"),
    ("hub", "errors"),
    ("cache", "errors"),
    ("cache", "files"),
    ("errors", "terminal"),
    ("time_limit", "errors"),
    ("extensions", "errors"),
    ("config", "errors"),
    ("config", "terminal"),
    ("pages", "terminal"),
    ("reader", "training"),
    ("reader", "validation"),
    # `train` takes the trainer of --engine jax, which is built on what is shared
    ("training", "jax_engine"),
}

HOMES = {
    "mlflow": ["tracking/"],
    "click": ["cli/"],
    "ray": ["engines/ray.py"],
    "jax": ["jax_engine/"],
    "faiss": ["retrieval/search.py"],
    "ir_datasets": ["collection/irds.py", "stores/irds.py"],
    "bm25s": ["retrieval/bm25.py"],
    "Stemmer": ["retrieval/bm25.py"],
    "regex": ["retrieval/answers.py", "reader/scoring.py"],
    "datasets": ["collection/hub.py", "stores/arrow.py"],
    "zstandard": ["stores/compressed.py"],
    "lmdb": ["stores/databases.py"],
    "lance": ["stores/databases.py"],
    "pytrec_eval": ["retrieval/measures.py"],
    "ir_measures": ["retrieval/measures.py"],
    "psutil": ["launch.py", "process_tree.py"],
    "sentence_transformers": ["encoder/"],
    "scipy": ["decisions/significance.py", "retrieval/estimate.py", "retrieval/tails.py"],
    "xxhash": ["cache.py"],
    "matplotlib": [
        *("decisions/comparison.py", "fidelity_study/report.py", "loaders/", "pages.py"),
        *("report/figures.py", "qa/page.py"),
    ],
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def subpackage(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "mlflow_dr":
                yield from (f"mlflow_dr.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_subpackage_imports_only_from_lower_layers(path: Path) -> None:
    here = subpackage(path)
    if here in ("__init__", "__main__"):
        return
    for name in imports(path):
        if not name.startswith("mlflow_dr."):
            continue
        imported = name.split(".")[1]
        if imported == here or (here, imported) in ALLOWED_BESIDE:
            continue
        assert FLOORS[imported] < FLOORS[here], f"{here} must not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_subpackage(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        if homes:
            assert any(module.startswith(home) for home in homes), f"{module} imports {name}"


# these import a heavy or optional library at their top, so they are imported late themselves
LATE = ["mlflow_dr.encoder.backbone"]
JAX_ROOM = "jax_engine"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_late(path: Path) -> None:
    early = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    late = {"faiss", "ir_datasets", "datasets", "pytrec_eval", "ir_measures", "bm25s", "Stemmer"}
    assert not early & (late | {"scipy", "matplotlib", "ray", "zstandard", "lmdb", "lance"})
    assert not set(imports(path, top_level_only=True)) & set(LATE)
    if subpackage(path) != JAX_ROOM:
        names = set(imports(path, top_level_only=True))
        assert not [name for name in names if name.startswith((f"mlflow_dr.{JAX_ROOM}", "jax"))]
    if path.name != "backbone.py":
        assert "sentence_transformers" not in early
