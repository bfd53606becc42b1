"""pyproject.toml, constraints.txt and conda.yaml name the same packages."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# what conda-forge calls them
CONDA_NAMES = {
    "pytorch-gpu": "torch",
    "matplotlib-base": "matplotlib",
    "faiss-gpu": "faiss-gpu-cu12",
}
NOT_INSTALLED_HERE = {"faiss-gpu-cu12"}


def declared() -> dict[str, Requirement]:
    """name -> requirement, of the package and its extras, but those of its developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *(text for name in extras if name != "dev" for text in extras[name]),
    ]
    return {canonicalize_name(one.name): one for one in map(Requirement, texts)}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pins}


@pytest.mark.parametrize("name", sorted(set(declared()) - NOT_INSTALLED_HERE))
def test_what_is_needed_is_pinned_to_a_version_that_is_allowed(name: str) -> None:
    assert name in pinned()
    assert declared()[name].specifier.contains(pinned()[name])


def test_conda_allows_the_same_versions() -> None:
    text = (ROOT / "conda.yaml").read_text(encoding="utf-8")
    listed = yaml.safe_load(text)["dependencies"]
    (by_pip,) = [one["pip"] for one in listed if isinstance(one, dict)]
    texts = [
        one for one in listed if isinstance(one, str) and not one.startswith(("python=", "pip"))
    ]
    found = [Requirement(one) for one in [*texts, *by_pip] if not one.startswith("-e")]
    names = {CONDA_NAMES.get(one.name, canonicalize_name(one.name)): one for one in found}
    for name, one in names.items():
        assert str(one.specifier) == str(declared()[name].specifier), name
    assert "-e ." in by_pip  # what conda does not bring
